#include <algorithm>
#include <array>
#include <charconv>
#include <cinttypes>
#include <cstdio>
#include <optional>
#include <set>
#include <span>
#include <tuple>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

#include "json_reader.h"
#include "strict_json.h"

namespace lockstep::format {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kMagic = "lockstep-checkpoint";
constexpr int kVersion = 1;
constexpr const char* kMembers[] = {"format",      "version", "step",   "epoch", "samples", "world_size",
                                    "parent_step", "config",  "record", "data",  "files",   "tensors"};
constexpr size_t kMaxSettingsBytes = size_t{1} << 20;  // of config and of record
constexpr size_t kMaxFingerprintBytes = 1024;
constexpr size_t kMaxWordBytes = 80;  // of dtypes and the format's name, which are shorter

std::optional<uint32_t> parse_hex8(std::string_view text) {
  uint32_t value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  const bool is_whole = text.size() == 8 && parsed.ec == std::errc() && parsed.ptr == text.data() + 8;
  return is_whole ? std::optional(value) : std::nullopt;
}

std::string parse_fingerprint(JsonReader& json) {
  const std::string_view text = json.read_text();
  if (text.size() > kMaxFingerprintBytes) json.fail("has more than " + std::to_string(kMaxFingerprintBytes) + " bytes");
  return std::string(text);
}

Json parse_ours(const std::string& json, const char* what) {
  Json parsed = json.empty() ? Json::object() : Json::parse(json, nullptr, /*allow_exceptions=*/false);
  LOCKSTEP_CHECK(!parsed.is_discarded()) << what << " is not valid JSON: " << json;
  return parsed;
}

StoredFile parse_file(JsonReader& json) {
  std::optional<std::string> name;
  std::optional<int64_t> bytes;
  std::optional<uint32_t> header_crc;
  std::string sha256;
  json.enter_object();
  while (const auto key = json.next_key()) {
    if (*key == "name") {
      name = json.read_text();
      if (!is_file_name(*name)) json.fail("names a file that could lie elsewhere");
    } else if (*key == "bytes") {
      bytes = json.read_count();
    } else if (*key == "header_crc32c") {
      header_crc = parse_hex8(json.read_text());
      if (!header_crc) json.fail("is a bad checksum");
    } else if (*key == "sha256") {
      sha256 = json.read_text().substr(0, kMaxWordBytes);
      if (!is_sha256(sha256)) json.fail("is no SHA-256");
    }
  }
  json.require(name.has_value(), "name");
  json.require(bytes.has_value(), "bytes");
  json.require(header_crc.has_value(), "header_crc32c");
  json.charge_block(name->size());
  if (!sha256.empty()) json.charge_block(sha256.size());
  return {*name, static_cast<uint64_t>(*bytes), *header_crc, sha256};
}

std::vector<StoredFile> parse_files(JsonReader& json) {
  std::vector<StoredFile> files;
  const size_t count = json.count_elements();
  json.charge(count * sizeof(StoredFile));
  files.reserve(count);
  json.enter_array();
  while (json.next_element()) files.push_back(parse_file(json));
  return files;
}

void check_names_differ(const std::vector<StoredFile>& files, const std::string& path) {
  std::vector<std::string_view> names;
  names.reserve(files.size());
  for (const StoredFile& file : files) names.emplace_back(file.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) throw CorruptData(path + " lists the file '" + std::string(*twice) + "' twice");
}

StoredBox parse_box(JsonReader& json) {
  std::optional<std::vector<int64_t>> offsets, sizes;
  std::optional<int64_t> file;
  json.enter_object();
  while (const auto key = json.next_key()) {
    if (*key == "offsets") offsets = json.read_counts(kMaxRank);
    if (*key == "sizes") sizes = json.read_counts(kMaxRank);
    if (*key == "file") file = json.read_count();
  }
  json.require(offsets.has_value(), "offsets");
  json.require(sizes.has_value(), "sizes");
  json.require(file.has_value(), "file");
  return {{std::move(*offsets), std::move(*sizes)}, static_cast<size_t>(*file)};
}

std::vector<StoredBox> parse_boxes(JsonReader& json) {
  std::vector<StoredBox> boxes;
  const size_t count = json.count_elements();
  json.charge(count * sizeof(StoredBox));
  boxes.reserve(count);
  json.enter_array();
  while (json.next_element()) boxes.push_back(parse_box(json));
  return boxes;
}

// `json` is only asked for memory, and to name the tensor.
void check_tensor(const StoredTensor& tensor, JsonReader& json, const std::string& what) {
  int64_t bytes = 0;
  if (__builtin_mul_overflow(checked_numel(tensor.shape, what), item_bytes(tensor.dtype), &bytes))
    throw CorruptData(what + " has an impossible shape");
  const size_t scratch = tensor.boxes.size() * 2 * sizeof(size_t);  // a pointer and an index each
  json.charge(scratch);
  std::vector<size_t> files;
  std::vector<const Box*> boxes;
  files.reserve(tensor.boxes.size());
  boxes.reserve(tensor.boxes.size());
  for (const StoredBox& stored : tensor.boxes) {
    files.push_back(stored.file);
    boxes.push_back(&stored.box);
  }
  std::sort(files.begin(), files.end());
  if (std::adjacent_find(files.begin(), files.end()) != files.end())
    throw CorruptData(what + " lies twice in one file");
  if (!point_to_tiles(boxes, tensor.shape))
    throw CorruptData(what + " has boxes that overlap, stick out or leave a gap");
  json.refund(scratch);
}

StoredTensor parse_tensor(std::string_view name, JsonReader& json, const std::string& path) {
  if (!is_tensor_name(name)) json.fail("is a tensor without a lawful name");
  std::optional<std::string> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::vector<StoredBox>> boxes;
  json.enter_object();
  while (const auto key = json.next_key()) {
    if (*key == "dtype") dtype = json.read_text().substr(0, kMaxWordBytes);
    if (*key == "shape") shape = json.read_counts(kMaxRank);
    if (*key == "boxes") boxes = parse_boxes(json);
  }
  json.require(dtype.has_value(), "dtype");
  json.require(shape.has_value(), "shape");
  json.require(boxes.has_value(), "boxes");
  StoredTensor tensor{std::move(*dtype), std::move(*shape), std::move(*boxes)};
  check_tensor(tensor, json, "tensor '" + std::string(name) + "' in " + path);
  return tensor;
}

std::map<std::string, StoredTensor> parse_tensors(JsonReader& json, const std::string& path) {
  constexpr size_t kNodeBytes = 176;
  std::map<std::string, StoredTensor> tensors;
  json.enter_object();
  while (const auto key = json.next_key()) {
    if (tensors.size() == kMaxTensors) json.fail("is one tensor too many");
    json.charge(kNodeBytes);
    json.charge_block(key->size());
    tensors.emplace(*key, parse_tensor(*key, json, path));
  }
  return tensors;
}

// Written by people's flags; a tree of it is made, so it must be small.
std::string parse_settings(JsonReader& json, const std::string& path) {
  const std::string_view text = json.skip_value();
  if (text.size() > kMaxSettingsBytes) json.fail("has more than " + std::to_string(kMaxSettingsBytes) + " bytes");
  if (!text.starts_with('{')) json.fail("is no object");
  return strict_parse(std::string(text), path).dump();
}

std::string lies_elsewhere(const std::string& key, const std::string& path, size_t file, size_t num_files) {
  return "tensor '" + key + "' in " + path + " lies in file " + std::to_string(file) + " of " +
         std::to_string(num_files);
}

void check_file_indices(const Manifest& manifest, const std::string& path) {
  for (const auto& [key, tensor] : manifest.tensors) {
    for (const StoredBox& stored : tensor.boxes) {
      if (stored.file >= manifest.files.size())
        throw CorruptData(lies_elsewhere(key, path, stored.file, manifest.files.size()));
    }
  }
}

// Whatever a reader would refuse must not be called durable.
void check_readable(const std::string& text) {
  try {
    parse_manifest(text, kManifestName);
  } catch (const CorruptData& error) {
    LOCKSTEP_CHECK(false) << "this manifest could not be read again: " << error.what();
  }
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
  for (const StoredFile& file : manifest.files) {
    files.push_back({{"name", file.name}, {"bytes", file.bytes}, {"header_crc32c", hex8(file.header_crc)}});
    if (!file.sha256.empty()) files.back()["sha256"] = file.sha256;
  }
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
  std::string text = json.dump() + "\n";
  text += "crc32c " + hex8(crc32c(text)) + "\n";
  check_readable(text);
  return text;
}

Manifest parse_manifest(const std::string& text, const std::string& path) {
  constexpr size_t kTrailer = sizeof("crc32c 00000000\n") - 1;
  const std::string what = "'" + path + "'";
  if (text.size() <= kTrailer || text.size() > kMaxManifestBytes)
    throw CorruptData(what + " has " + std::to_string(text.size()) + " bytes, no manifest has");
  const std::string_view body = std::string_view(text).substr(0, text.size() - kTrailer);
  if (text.substr(body.size()) != "crc32c " + hex8(crc32c(std::as_bytes(std::span(body)))) + "\n")
    throw CorruptData(what + " fails its checksum");
  JsonReader json(body, what);
  Manifest manifest;
  std::optional<std::string> format;
  std::optional<int64_t> version;
  std::set<std::string_view> seen;
  json.enter_object();
  while (const auto key = json.next_key()) {
    if (*key == "format") format = json.read_text().substr(0, kMaxWordBytes);
    if (*key == "version") version = json.read_count();
    if (version && *version != kVersion) break;  // of a newer program, whatever comes now
    if (*key == "step") manifest.step = json.read_count();
    if (*key == "epoch") manifest.epoch = static_cast<uint64_t>(json.read_count());
    if (*key == "samples") manifest.samples = json.read_count();
    if (*key == "world_size") manifest.world_size = json.read_count();
    if (*key == "parent_step") manifest.parent_step = json.read_integer();
    if (*key == "config") manifest.config_json = parse_settings(json, path);
    if (*key == "record") manifest.record_json = parse_settings(json, path);
    if (*key == "data") manifest.data_fingerprint = parse_fingerprint(json);
    if (*key == "files") manifest.files = parse_files(json);
    if (*key == "tensors") manifest.tensors = parse_tensors(json, what);
    for (const char* known : kMembers) {
      if (*key == known) seen.insert(known);
    }
  }
  if (format && *format != kMagic) throw CorruptData(what + " is no lockstep checkpoint");
  if (version && *version != kVersion) {
    throw ConfigError(what + " has format version " + std::to_string(*version) + ", this program reads " +
                      std::to_string(kVersion) + ". Mend: use a newer lockstep");
  }
  json.finish();
  for (const char* known : kMembers) json.require(seen.contains(known), known);
  check_names_differ(manifest.files, what);
  check_file_indices(manifest, what);
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
