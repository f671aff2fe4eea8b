#include <algorithm>
#include <cstdio>
#include <regex>

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
constexpr const char* kQuarantineName = "QUARANTINED";

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.size() <= 200 && name[0] != '.' &&
         std::all_of(name.begin(), name.end(),
                     [](unsigned char c) { return std::isalnum(c) || c == '.' || c == '_' || c == '-'; });
}

void check_tiling(const std::string& key, const StoredTensor& tensor, const std::string& path) {
  const std::string what = "tensor '" + key + "' in '" + path + "'";
  int64_t covered = 0;
  for (size_t i = 0; i < tensor.boxes.size(); ++i) {
    const Box& box = tensor.boxes[i].box;
    if (box.offsets.size() != tensor.shape.size() || box.sizes.size() != tensor.shape.size())
      throw CorruptData(what + " has a box of another rank");
    for (size_t d = 0; d < tensor.shape.size(); ++d) {
      if (box.offsets[d] < 0 || box.sizes[d] < 0 || box.offsets[d] > tensor.shape[d] - box.sizes[d])
        throw CorruptData(what + " has a box outside the tensor");
    }
    covered += box.numel();
    for (size_t j = 0; j < i && box.numel() > 0; ++j) {
      if (intersection(box, tensor.boxes[j].box).numel() > 0) throw CorruptData(what + " has overlapping boxes");
    }
  }
  if (covered != checked_numel(tensor.shape, what)) throw CorruptData(what + " has boxes that do not fill it");
}

template <typename T>
T get(const nlohmann::json& json, const char* key, const std::string& path) {
  try {
    return json.at(key).get<T>();
  } catch (const nlohmann::json::exception& error) {
    throw CorruptData("'" + path + "': " + key + ": " + error.what());
  }
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
                     {"config", Json::parse(manifest.config_json)},
                     {"record", Json::parse(manifest.record_json)},
                     {"data", manifest.data_fingerprint},
                     {"files", files},
                     {"tensors", tensors}};
  const std::string text = json.dump() + "\n";
  return text + "crc32c " + hex8(crc32c(text)) + "\n";
}

Manifest parse_manifest(const std::string& text, const std::string& path) {
  constexpr size_t kTrailer = sizeof("crc32c 00000000\n") - 1;
  if (text.size() <= kTrailer || text.size() > kMaxManifestBytes)
    throw CorruptData("'" + path + "' has " + std::to_string(text.size()) + " bytes, no manifest has");
  const std::string body = text.substr(0, text.size() - kTrailer);
  if (text.substr(body.size()) != "crc32c " + hex8(crc32c(body)) + "\n")
    throw CorruptData("'" + path + "' fails its checksum");
  const nlohmann::json json = strict_parse(body, path);
  if (get<std::string>(json, "format", path) != kMagic) throw CorruptData("'" + path + "' is no lockstep checkpoint");
  if (get<int>(json, "version", path) != kVersion) {
    throw ConfigError("'" + path + "' has format version " + std::to_string(get<int>(json, "version", path)) +
                      ", this program reads " + std::to_string(kVersion) + ". Mend: use a newer lockstep");
  }
  Manifest manifest;
  manifest.step = get<int64_t>(json, "step", path);
  manifest.epoch = get<uint64_t>(json, "epoch", path);
  manifest.samples = get<int64_t>(json, "samples", path);
  manifest.world_size = get<int64_t>(json, "world_size", path);
  manifest.parent_step = get<int64_t>(json, "parent_step", path);
  manifest.config_json = get<nlohmann::json>(json, "config", path).dump();
  manifest.record_json = get<nlohmann::json>(json, "record", path).dump();
  manifest.data_fingerprint = get<std::string>(json, "data", path);
  for (const auto& file : get<std::vector<nlohmann::json>>(json, "files", path)) {
    StoredFile stored{.name = get<std::string>(file, "name", path), .bytes = get<uint64_t>(file, "bytes", path)};
    const std::string crc = get<std::string>(file, "header_crc32c", path);
    if (!is_plain_name(stored.name))
      throw CorruptData("'" + path + "' names a file '" + stored.name + "' that could lie elsewhere");
    char* end = nullptr;
    stored.header_crc = static_cast<uint32_t>(std::strtoul(crc.c_str(), &end, 16));
    if (crc.size() != 8 || *end != '\0')
      throw CorruptData("'" + path + "' has a bad checksum for '" + stored.name + "'");
    manifest.files.push_back(std::move(stored));
  }
  const auto tensors = get<nlohmann::json>(json, "tensors", path);
  if (!tensors.is_object() || tensors.size() > kMaxTensors) throw CorruptData("'" + path + "' has no list of tensors");
  for (const auto& [key, value] : tensors.items()) {
    if (key.empty() || key.size() > kMaxNameBytes)
      throw CorruptData("'" + path + "' has a tensor name of " + std::to_string(key.size()) + " bytes");
    StoredTensor tensor{.dtype = get<std::string>(value, "dtype", path),
                        .shape = get<std::vector<int64_t>>(value, "shape", path)};
    item_bytes(tensor.dtype);
    for (const auto& box : get<std::vector<nlohmann::json>>(value, "boxes", path)) {
      StoredBox stored{{get<std::vector<int64_t>>(box, "offsets", path), get<std::vector<int64_t>>(box, "sizes", path)},
                       get<size_t>(box, "file", path)};
      if (stored.file >= manifest.files.size())
        throw CorruptData("'" + path + "': tensor '" + key + "' lies in file " + std::to_string(stored.file) + " of " +
                          std::to_string(manifest.files.size()));
      tensor.boxes.push_back(std::move(stored));
    }
    check_tiling(key, tensor, path);
    manifest.tensors.emplace(key, std::move(tensor));
  }
  return manifest;
}

std::string tensor_key(const std::string& section, const std::string& name) {
  return section == "weights" ? name : section + ":" + name;
}

std::string section_of(const std::string& key) {
  const size_t colon = key.find(':');
  return colon == std::string::npos ? "weights" : key.substr(0, colon);
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
  static const std::regex pattern("step-([0-9]{8,18})\\.e([0-9]{4,18})");
  std::vector<Candidate> candidates;
  if (!fs.exists(checkpoints_directory)) return candidates;
  for (const std::string& name : fs.list_directory(checkpoints_directory)) {
    std::smatch match;
    if (!std::regex_match(name, match, pattern)) continue;
    Candidate candidate{
        .step = std::stoll(match[1]), .epoch = std::stoull(match[2]), .path = checkpoints_directory + "/" + name};
    candidate.complete = fs.exists(candidate.path + "/" + kManifestName);
    candidate.quarantined = fs.exists(candidate.path + "/" + kQuarantineName);
    candidates.push_back(std::move(candidate));
  }
  std::sort(candidates.begin(), candidates.end(),
            [](const auto& a, const auto& b) { return std::tie(a.epoch, a.step) > std::tie(b.epoch, b.step); });
  return candidates;
}

std::string resolve_checkpoint(Fs& fs, const std::string& path) {
  if (fs.exists(path + "/" + kManifestName)) return path;
  for (const Candidate& candidate : list_candidates(fs, path + "/checkpoints")) {
    if (candidate.complete && !candidate.quarantined) return candidate.path;
  }
  throw ConfigError(
      "'" + path +
      "' is neither a checkpoint nor a run with a durable one. Mend: name a folder step-….e…, or a --run_dir");
}

}  // namespace lockstep::format
