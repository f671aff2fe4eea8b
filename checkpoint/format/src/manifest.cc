#include <algorithm>
#include <charconv>
#include <cstdio>
#include <set>
#include <tuple>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

#include "strict_json.h"

namespace lockstep::format {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kMagic = "lockstep-checkpoint";
constexpr int kVersion = 1;

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.size() <= 200 && name[0] != '.' &&
         std::all_of(name.begin(), name.end(),
                     [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '_' || c == '-'; });
}

Json parse_ours(const std::string& json, const char* what) {
  Json parsed = json.empty() ? Json::object() : Json::parse(json, nullptr, /*allow_exceptions=*/false);
  LOCKSTEP_CHECK(!parsed.is_discarded()) << what << " is not valid JSON: " << json;
  return parsed;
}

StoredFile parse_file(const nlohmann::json& json, const std::string& path) {
  StoredFile file{.name = text_of(json, "name", path),
                  .bytes = static_cast<uint64_t>(count_of(json, "bytes", path)),
                  .header_crc = 0};
  if (!is_plain_name(file.name))
    throw CorruptData(path + " names a file " + nlohmann::json(file.name).dump() + " that could lie elsewhere");
  const std::string crc = text_of(json, "header_crc32c", path);
  const auto parsed = std::from_chars(crc.data(), crc.data() + crc.size(), file.header_crc, 16);
  if (crc.size() != 8 || parsed.ec != std::errc() || parsed.ptr != crc.data() + 8)
    throw CorruptData(path + " has a bad checksum for '" + file.name + "'");
  return file;
}

StoredTensor parse_tensor(const nlohmann::json& json, size_t num_files, const std::string& what) {
  StoredTensor tensor{.dtype = text_of(json, "dtype", what), .shape = counts_of(json, "shape", what), .boxes = {}};
  int64_t bytes = 0;
  if (__builtin_mul_overflow(checked_numel(tensor.shape, what), item_bytes(tensor.dtype), &bytes))
    throw CorruptData(what + " has an impossible shape");
  const auto& boxes = member_of(json, "boxes", what);
  if (!boxes.is_array()) throw CorruptData(what + " has no list of boxes");
  std::vector<Box> geometry;
  std::set<size_t> files;
  for (const auto& box : boxes) {
    const auto file = static_cast<size_t>(count_of(box, "file", what));
    if (file >= num_files)
      throw CorruptData(what + " lies in file " + std::to_string(file) + " of " + std::to_string(num_files));
    if (!files.insert(file).second) throw CorruptData(what + " lies twice in one file");
    geometry.push_back({counts_of(box, "offsets", what), counts_of(box, "sizes", what)});
    tensor.boxes.push_back({geometry.back(), file});
  }
  if (!tiles(geometry, tensor.shape)) throw CorruptData(what + " has boxes that overlap, stick out or leave a gap");
  return tensor;
}

}  // namespace

std::string encode_manifest(const Manifest& manifest) {
  Json files = Json::array(), tensors = Json::object();
  for (const StoredFile& file : manifest.files)
    files.push_back({{"name", file.name}, {"bytes", file.bytes}, {"header_crc32c", hex8(file.header_crc)}});
  for (const auto& [key, tensor] : manifest.tensors) {
    Json boxes = Json::array();
    for (const StoredBox& stored : tensor.boxes)
      boxes.push_back({{"offsets", stored.box.offsets}, {"sizes", stored.box.sizes}, {"file", stored.file}});
    tensors[key] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"boxes", boxes}};
  }
  const Json json = {{"format", kMagic},
                     {"version", kVersion},
                     {"step", manifest.step},
                     {"epoch", manifest.epoch},
                     {"samples", manifest.samples},
                     {"world_size", manifest.world_size},
                     {"parent_step", manifest.parent_step},
                     {"config", parse_ours(manifest.config_json, "the configuration")},
                     {"record", parse_ours(manifest.record_json, "the run record")},
                     {"data", manifest.data_fingerprint},
                     {"files", files},
                     {"tensors", tensors}};
  const std::string text = json.dump() + "\n";
  return text + "crc32c " + hex8(crc32c(text)) + "\n";
}

Manifest parse_manifest(const std::string& text, const std::string& path) {
  constexpr size_t kTrailer = sizeof("crc32c 00000000\n") - 1;
  const std::string what = "'" + path + "'";
  if (text.size() <= kTrailer || text.size() > kMaxManifestBytes)
    throw CorruptData(what + " has " + std::to_string(text.size()) + " bytes, no manifest has");
  const std::string body = text.substr(0, text.size() - kTrailer);
  if (text.substr(body.size()) != "crc32c " + hex8(crc32c(body)) + "\n")
    throw CorruptData(what + " fails its checksum");
  const nlohmann::json json = strict_parse(body, path);
  if (text_of(json, "format", what) != kMagic) throw CorruptData(what + " is no lockstep checkpoint");
  if (const int64_t version = count_of(json, "version", what); version != kVersion) {
    throw ConfigError(what + " has format version " + std::to_string(version) + ", this program reads " +
                      std::to_string(kVersion) + ". Mend: use a newer lockstep");
  }
  Manifest manifest;
  manifest.step = count_of(json, "step", what);
  manifest.epoch = static_cast<uint64_t>(count_of(json, "epoch", what));
  manifest.samples = count_of(json, "samples", what);
  manifest.world_size = count_of(json, "world_size", what);
  manifest.parent_step = integer_of(json, "parent_step", what);
  manifest.config_json = member_of(json, "config", what).dump();
  manifest.record_json = member_of(json, "record", what).dump();
  manifest.data_fingerprint = text_of(json, "data", what);
  const auto& files = member_of(json, "files", what);
  if (!files.is_array()) throw CorruptData(what + " has no list of files");
  std::set<std::string> names;
  for (const auto& file : files) {
    manifest.files.push_back(parse_file(file, what));
    const std::string& name = manifest.files.back().name;
    if (!names.insert(name).second) throw CorruptData(what + " lists the file '" + name + "' twice");
  }
  const auto& tensors = member_of(json, "tensors", what);
  if (!tensors.is_object() || tensors.size() > kMaxTensors) throw CorruptData(what + " has no list of tensors");
  for (const auto& [key, value] : tensors.items()) {
    if (!is_tensor_name(key)) throw CorruptData(what + " has a tensor without a lawful name");
    manifest.tensors.emplace(key, parse_tensor(value, manifest.files.size(), "tensor '" + key + "' in " + what));
  }
  return manifest;
}

bool is_weights_section(const std::string& section) { return section == kWeights || section == kBuffers; }

std::string tensor_key(const std::string& section, const std::string& name) {
  return section == kWeights ? name : section + ":" + name;
}

std::string section_of(const std::string& key) {
  const size_t colon = key.find(':');
  return colon == std::string::npos ? kWeights : key.substr(0, colon);
}

std::string directory_name(int64_t step, uint64_t epoch) {
  char name[64];
  std::snprintf(name, sizeof(name), "step-%08lld.e%04llu", static_cast<long long>(step),
                static_cast<unsigned long long>(epoch));
  return name;
}

std::string shard_name(int64_t rank, int64_t world_size) {
  char name[80];
  std::snprintf(name, sizeof(name), "shard-%05lld-model-%05d-of-%05lld.safetensors", static_cast<long long>(rank + 1),
                1, static_cast<long long>(world_size));
  return name;
}

std::vector<Candidate> list_candidates(Fs& fs, const std::string& checkpoints_directory) {
  std::vector<Candidate> candidates;
  if (!fs.exists(checkpoints_directory)) return candidates;
  for (const std::string& name : fs.list_directory(checkpoints_directory)) {
    long long step = 0;
    unsigned long long epoch = 0;
    if (std::sscanf(name.c_str(), "step-%18lld.e%18llu", &step, &epoch) != 2 || step < 0 ||
        directory_name(step, epoch) != name)
      continue;  // not ours: one spelling for each (step, epoch), so that no two folders claim one place in the order
    Candidate candidate{.step = step, .epoch = epoch, .path = checkpoints_directory + "/" + name};
    candidate.complete = fs.exists(candidate.path + "/" + kManifestName);
    candidate.quarantined = fs.exists(candidate.path + "/" + kQuarantineName);
    candidates.push_back(std::move(candidate));
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const auto& a, const auto& b) { return std::tie(a.epoch, a.step) > std::tie(b.epoch, b.step); });
  return candidates;
}

std::optional<Candidate> newest_complete(Fs& fs, const std::string& checkpoints_directory) {
  for (Candidate& candidate : list_candidates(fs, checkpoints_directory)) {
    if (candidate.complete && !candidate.quarantined) return std::move(candidate);
  }
  return std::nullopt;
}

std::string resolve_checkpoint(Fs& fs, const std::string& checkpoint_or_run) {
  if (fs.exists(checkpoint_or_run + "/" + kManifestName)) return checkpoint_or_run;
  if (const auto newest = newest_complete(fs, checkpoint_or_run + "/checkpoints")) return newest->path;
  throw ConfigError("'" + checkpoint_or_run +
                    "' is neither a checkpoint nor a run with a durable one. Mend: name a folder step-….e…, or a "
                    "--run_dir");
}

}  // namespace lockstep::format
