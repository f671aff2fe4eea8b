#include <algorithm>
#include <array>
#include <charconv>
#include <cinttypes>
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

Json parse_ours(const std::string& json, const char* what) {
  Json parsed = json.empty() ? Json::object() : Json::parse(json, nullptr, /*allow_exceptions=*/false);
  LOCKSTEP_CHECK(!parsed.is_discarded()) << what << " is not valid JSON: " << json;
  return parsed;
}

StoredFile parse_file(const nlohmann::json& json, const std::string& path) {
  StoredFile file{.name = text_of(json, "name", path),
                  .bytes = static_cast<uint64_t>(count_of(json, "bytes", path)),
                  .header_crc = 0};
  if (!is_file_name(file.name))
    throw CorruptData(path + " names a file " + nlohmann::json(file.name).dump() + " that could lie elsewhere");
  const std::string crc = text_of(json, "header_crc32c", path);
  const auto parsed = std::from_chars(crc.data(), crc.data() + crc.size(), file.header_crc, 16);
  if (crc.size() != 8 || parsed.ec != std::errc() || parsed.ptr != crc.data() + 8)
    throw CorruptData(path + " has a bad checksum for '" + file.name + "'");
  return file;
}

void check_names_differ(const std::vector<StoredFile>& files, const std::string& path) {
  std::vector<std::string> names;
  names.reserve(files.size());
  for (const StoredFile& file : files) names.push_back(file.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) throw CorruptData(path + " lists the file '" + *twice + "' twice");
}

StoredTensor parse_tensor(const std::string& key, const nlohmann::json& json, size_t num_files,
                          const std::string& path) {
  const std::string what = "tensor '" + key + "' in " + path;
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

std::string child(const std::string& directory, const char* name) { return directory + "/" + name; }

// One spelling only for each (step, epoch), so that no two folders claim one place in the order.
bool parse_directory_name(const std::string& name, Candidate& candidate) {
  const char* end = name.data() + name.size();
  constexpr std::string_view kPrefix = "step-", kMiddle = ".e";
  if (!name.starts_with(kPrefix)) return false;
  const auto step = std::from_chars(name.data() + kPrefix.size(), end, candidate.step);
  if (step.ec != std::errc() || !std::string_view(step.ptr, end).starts_with(kMiddle)) return false;
  const auto epoch = std::from_chars(step.ptr + kMiddle.size(), end, candidate.epoch);
  return epoch.ec == std::errc() && candidate.step >= 0 && directory_name(candidate.step, candidate.epoch) == name;
}

}  // namespace

bool is_file_name(const std::string& name) {
  return !name.empty() && name.size() <= 200 && name[0] != '.' &&
         std::all_of(name.begin(), name.end(),
                     [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '_' || c == '-'; });
}

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
  for (const auto& file : files) manifest.files.push_back(parse_file(file, what));
  check_names_differ(manifest.files, what);
  const auto& tensors = member_of(json, "tensors", what);
  if (!tensors.is_object() || tensors.size() > kMaxTensors) throw CorruptData(what + " has no list of tensors");
  for (const auto& [key, value] : tensors.items()) {
    if (!is_tensor_name(key)) throw CorruptData(what + " has a tensor without a lawful name");
    manifest.tensors.emplace(key, parse_tensor(key, value, manifest.files.size(), what));
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
  std::array<char, 64> name{};
  std::snprintf(name.data(), name.size(), "step-%08" PRId64 ".e%04" PRIu64, step, epoch);
  return name.data();
}

std::string shard_name(int64_t rank, int64_t world_size) {
  std::array<char, 96> name{};  // torch's pattern: shard, then the model file it would belong to, of how many
  std::snprintf(name.data(), name.size(), "shard-%05" PRId64 "-model-00001-of-%05" PRId64 ".safetensors", rank + 1,
                world_size);
  return name.data();
}

std::vector<Candidate> list_candidates(Fs& fs, const std::string& checkpoints_directory) {
  std::vector<Candidate> candidates;
  if (!fs.exists(checkpoints_directory)) return candidates;
  for (const std::string& name : fs.list_directory(checkpoints_directory)) {
    Candidate candidate;
    if (!parse_directory_name(name, candidate)) continue;
    candidate.path = child(checkpoints_directory, name.c_str());
    candidate.complete = fs.exists(child(candidate.path, kManifestName));
    candidate.quarantined = fs.exists(child(candidate.path, kQuarantineName));
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
