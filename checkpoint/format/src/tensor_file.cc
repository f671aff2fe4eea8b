#include <algorithm>
#include <cstring>
#include <optional>

#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/tensor_file.h>

#include "json_reader.h"

namespace lockstep::format {
namespace {

constexpr uint64_t kAlignment = 64;
constexpr const char* kMetadataKey = "__metadata__";

const std::map<std::string, int64_t>& dtype_sizes() {
  static const std::map<std::string, int64_t> sizes = {{"F64", 8}, {"F32", 4},  {"F16", 2},     {"BF16", 2},
                                                       {"I64", 8}, {"I32", 4},  {"I16", 2},     {"I8", 1},
                                                       {"U8", 1},  {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}};
  return sizes;
}

bool is_dtype(const std::string& name) { return dtype_sizes().contains(name); }

TensorEntry parse_entry(std::string_view name, JsonReader& json, const std::string& path) {
  if (!is_tensor_name(name)) json.fail("is no lawful name");
  TensorEntry entry{.name = std::string(name)};
  json.charge_block(name.size());
  std::optional<std::string> dtype;
  std::optional<std::vector<int64_t>> shape, offsets;
  json.enter_object();
  while (const auto key = json.next_key()) {
    if (*key == "dtype") {
      dtype = json.read_text();
      if (!is_dtype(*dtype)) json.fail("is the unknown dtype '" + shown(*dtype) + "'");
    } else if (*key == "shape") {
      shape = json.read_counts(kMaxRank);
    } else if (*key == "data_offsets") {
      offsets = json.read_counts(2);
      if (offsets->size() != 2 || offsets->front() > offsets->back()) json.fail("holds bad data_offsets");
    }
  }
  json.require(dtype.has_value(), "dtype");
  json.require(shape.has_value(), "shape");
  json.require(offsets.has_value(), "data_offsets");
  entry.dtype = std::move(*dtype);
  entry.shape = std::move(*shape);
  entry.begin = static_cast<uint64_t>(offsets->front());
  entry.end = static_cast<uint64_t>(offsets->back());
  const std::string what = "tensor '" + entry.name + "' in '" + path + "'";
  int64_t bytes = 0;
  if (__builtin_mul_overflow(checked_numel(entry.shape, what), item_bytes(entry.dtype), &bytes) ||
      static_cast<uint64_t>(bytes) != entry.end - entry.begin) {
    throw CorruptData(what + " has " + std::to_string(entry.end - entry.begin) +
                      " bytes of data, its shape and dtype " + entry.dtype + " say " + std::to_string(bytes));
  }
  return entry;
}

std::map<std::string, std::string> parse_metadata(JsonReader& json) {
  constexpr size_t kNodeBytes = 112;
  std::map<std::string, std::string> metadata;
  json.enter_object();
  while (const auto key = json.next_key()) {
    const std::string_view value = json.read_text();
    json.charge(kNodeBytes);
    json.charge_block(key->size());
    json.charge_block(value.size());
    metadata.emplace(*key, value);
  }
  return metadata;
}

}  // namespace

bool is_tensor_name(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes && name != kMetadataKey &&
         std::none_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; });
}

int64_t item_bytes(const std::string& dtype) {
  const auto found = dtype_sizes().find(dtype);
  if (found == dtype_sizes().end()) throw CorruptData("unknown dtype '" + shown(dtype) + "'");
  return found->second;
}

int64_t checked_numel(const std::vector<int64_t>& shape, const std::string& what) {
  if (shape.size() > kMaxRank)
    throw CorruptData(what + " has " + std::to_string(shape.size()) + " dims, more than " + std::to_string(kMaxRank));
  int64_t numel = 1;
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(numel, size, &numel)) throw CorruptData(what + " has an impossible shape");
  }
  return numel;
}

std::string encode_header(std::vector<TensorEntry>& tensors, const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json[kMetadataKey] = metadata;
  uint64_t offset = 0;
  for (TensorEntry& tensor : tensors) {
    LOCKSTEP_CHECK(is_tensor_name(tensor.name)) << "'" << tensor.name << "' cannot name a tensor in a file";
    const auto bytes =
        static_cast<uint64_t>(checked_numel(tensor.shape, "tensor '" + tensor.name + "'") * item_bytes(tensor.dtype));
    tensor.begin = offset;
    tensor.end = offset += bytes;
    json[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {tensor.begin, tensor.end}}};
  }
  std::string text = json.dump();
  text.append((kAlignment - (text.size() + sizeof(uint64_t)) % kAlignment) % kAlignment, ' ');
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text;  // little-endian, as this machine
}

std::string read_head(const File& file, const std::string& path) {
  const uint64_t file_bytes = file.size();
  uint64_t length = 0;
  if (file_bytes < sizeof(length))
    throw CorruptData("'" + path + "' has " + std::to_string(file_bytes) + " bytes, too few for a safetensors file");
  file.read_at(0, std::as_writable_bytes(std::span(&length, 1)));
  if (length > kMaxHeaderBytes || length > file_bytes - sizeof(length)) {
    throw CorruptData("'" + path + "' claims a header of " + std::to_string(length) + " bytes in a file of " +
                      std::to_string(file_bytes));
  }
  std::string head(sizeof(length) + length, '\0');
  file.read_at(0, std::as_writable_bytes(std::span(head.data(), head.size())));
  return head;
}

TensorHeader parse_header(const std::string& head, uint64_t file_bytes, const std::string& path) {
  uint64_t length = 0;
  if (head.size() < sizeof(length)) throw CorruptData("'" + path + "' is too short to be a safetensors file");
  std::memcpy(&length, head.data(), sizeof(length));
  if (length > kMaxHeaderBytes || head.size() - sizeof(length) < length || file_bytes < head.size())
    throw CorruptData("'" + path + "' has a header of another length than it claims");
  JsonReader json(std::string_view(head).substr(sizeof(length), length), "'" + path + "'");
  TensorHeader header;
  header.data_start = sizeof(length) + length;
  json.enter_object();
  while (const auto name = json.next_key()) {
    if (*name == kMetadataKey) {
      header.metadata = parse_metadata(json);
      continue;
    }
    if (header.tensors.size() == kMaxTensors) json.fail("is one tensor too many");
    json.charge(2 * sizeof(TensorEntry));  // a vector that grows holds old and new at once
    header.tensors.push_back(parse_entry(*name, json, path));
  }
  json.finish();
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const auto& a, const auto& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
  uint64_t end = 0;
  for (const TensorEntry& tensor : header.tensors) {
    if (tensor.begin != end)
      throw CorruptData("tensor '" + tensor.name + "' in '" + path + "' starts at byte " +
                        std::to_string(tensor.begin) + " where " + std::to_string(end) + " is next");
    end = tensor.end;
  }
  if (header.data_start + end != file_bytes) {
    throw CorruptData("'" + path + "' has " + std::to_string(file_bytes) + " bytes, its header describes " +
                      std::to_string(header.data_start + end));
  }
  return header;
}

TensorHeader read_header(const File& file, const std::string& path) {
  return parse_header(read_head(file, path), file.size(), path);
}

}  // namespace lockstep::format
