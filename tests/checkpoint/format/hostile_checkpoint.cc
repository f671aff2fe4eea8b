#include "hostile_checkpoint.h"

#include <cstring>
#include <filesystem>
#include <fstream>

#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include <lockstep/format/checksum.h>
#include <lockstep/format/manifest.h>

#include "written_checkpoint.h"

namespace lockstep::format {
namespace {

namespace fs = std::filesystem;

std::string framed(const std::string& json) {
  const uint64_t length = json.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + json;
}

}  // namespace

HostileCheckpoints::HostileCheckpoints(std::string elsewhere, unsigned seed)
    : elsewhere_(std::move(elsewhere)), random_(seed) {
  const std::vector<int64_t> shape = {6, 4};
  write_checkpoint(elsewhere_, {{"w", "F32", shape, {{{0, 0}, {4, 4}}, {{4, 0}, {2, 4}}}},
                                {"exp_avg:w", "BF16", shape, {Box::whole(shape)}}});
  for (int64_t i = 0; i < 2; ++i) {
    const std::string name = shard_name(i, 2), bytes = slurp(elsewhere_ + "/" + name);
    uint64_t length = 0;
    std::memcpy(&length, bytes.data(), sizeof(length));
    good_.push_back({name, bytes.substr(0, 8 + length), bytes.substr(8 + length)});
  }
  const std::string manifest = slurp(elsewhere_ + "/" + kManifestName);
  const size_t begin = manifest.find("\"tensors\":");
  good_tensors_ = manifest.substr(begin, manifest.find("\ncrc32c") - begin - 1);
}

std::string HostileCheckpoints::make(const std::string& directory) {
  fs::remove_all(directory);
  fs::create_directory(directory);
  shards_ = good_;
  tensors_ = good_tensors_;
  spoils_manifest_ = false;
  exchanged_.clear();
  std::string what;
  switch (random_() % 5) {
    case 0:
      what = spoil_name();
      break;
    case 1:
      what = spoil_file(directory);
      break;
    case 2:
      what = spoil_header();
      break;
    case 3:
      what = "boxes: " + spoil_text(tensors_, 0);
      break;
    default:
      spoils_manifest_ = true;
      what = "manifest";
  }
  write(directory);
  return what;
}

std::string HostileCheckpoints::spoil_name() {
  const std::string real = shards_[random_() % 2].name;
  const std::string names[] = {"../" + fs::path(elsewhere_).filename().string() + "/" + real,
                               elsewhere_ + "/" + real,
                               "..",
                               ".",
                               "./" + real,
                               "",
                               "/",
                               real + "/",
                               real + "/../../" + fs::path(elsewhere_).filename().string() + "/" + real,
                               "..\\" + real,
                               "%2e%2e%2f" + real,
                               "..\xe2\x88\x95" + real,
                               real + std::string("\0.safetensors", 13),
                               std::string(201, 's'),
                               ".hidden",
                               "/dev/zero",
                               "/proc/self/environ",
                               "MANIFEST",
                               real + "\n",
                               "~/" + real};
  return "name " + (shards_[random_() % 2].name = names[random_() % std::size(names)]);
}

std::string HostileCheckpoints::spoil_file(const std::string& directory) {
  exchanged_ = random_() % 4 == 0 ? kManifestName : shards_[random_() % 2].name;
  const std::string path = directory + "/" + exchanged_, twin = elsewhere_ + "/" + exchanged_;
  switch (random_() % 8) {
    case 0:
      fs::create_symlink(twin, path);
      return "a link to " + twin;
    case 1:
      fs::create_symlink("../" + fs::path(elsewhere_).filename().string() + "/" + exchanged_, path);
      return "a relative link";
    case 2:
      fs::create_symlink("nowhere", path);
      return "a link to nowhere";
    case 3:
      return mkfifo(path.c_str(), 0600) == 0 ? "a FIFO" : "nothing";
    case 4:
      fs::create_directory(path);
      return "a folder";
    case 5:
      return mknod(path.c_str(), S_IFSOCK | 0600, 0) == 0 ? "a socket" : "nothing";
    case 6:  // /dev/zero; only root makes devices
      return mknod(path.c_str(), S_IFCHR | 0600, makedev(1, 5)) == 0 ? "a device" : "nothing";
    default:
      fs::create_symlink("/proc/self/fd/0", path);
      return "a magic link";
  }
}

std::string HostileCheckpoints::spoil_header() {
  Shard& shard = shards_[random_() % 2];
  std::string json = shard.head.substr(8);
  const std::string what = spoil_text(json, 0);
  shard.head = framed(json);
  if (random_() % 4 == 0) shard.data.resize(random_() % 200);
  if (random_() % 8 == 0) {
    const uint64_t lie = uint64_t{random_()} << (random_() % 32);
    std::memcpy(shard.head.data(), &lie, sizeof(lie));
  }
  return "header: " + what;
}

// Other numbers, other characters, parts that repeat.
std::string HostileCheckpoints::spoil_text(std::string& text, size_t begin) {
  const char* const numbers[] = {"0",
                                 "-1",
                                 "9223372036854775807",
                                 "9223372036854775808",
                                 "18446744073709551615",
                                 "4611686018427387904",
                                 "1e300",
                                 "4294967296",
                                 "3037000500",
                                 "1.5",
                                 "true",
                                 "[]",
                                 "\"\""};
  const size_t digits = random_() % 2 == 0 ? text.find_first_of("0123456789", begin + random_() % (text.size() - begin))
                                           : std::string::npos;
  if (digits != std::string::npos) {
    const std::string number = numbers[random_() % std::size(numbers)];
    text.replace(digits, text.find_first_not_of("0123456789", digits) - digits, number);
    return "number " + number;
  }
  for (size_t change = 0; change <= random_() % 4; ++change) {
    const size_t at = begin + random_() % (text.size() - begin);
    if (random_() % 2) {
      text[at] = "{}[]\",:0123456789-.eE\\\x80"[random_() % 22];
    } else {
      text.replace(at, random_() % 8, text.substr(random_() % text.size(), random_() % 30));
    }
  }
  return "characters";
}

void HostileCheckpoints::write(const std::string& directory) {
  nlohmann::ordered_json files = nlohmann::ordered_json::array();
  for (const Shard& shard : shards_) {
    files.push_back({{"name", shard.name},
                     {"bytes", shard.head.size() + shard.data.size()},
                     {"header_crc32c", hex8(crc32c(shard.head))}});
    const bool is_a_name = is_file_name(shard.name) && shard.name != kManifestName;
    if (is_a_name && shard.name != exchanged_)
      std::ofstream(directory + "/" + shard.name, std::ios::binary) << shard.head << shard.data;
  }
  std::string body = R"({"format":"lockstep-checkpoint","version":1,"step":1,"epoch":1,"samples":0,"world_size":2,)"
                     R"("parent_step":-1,"config":{},"record":{},"data":"","files":)" +
                     files.dump() + "," + tensors_ + "}\n";
  if (spoils_manifest_) spoil_text(body, 0);
  if (exchanged_ != kManifestName)
    std::ofstream(directory + "/" + kManifestName, std::ios::binary) << body << "crc32c " << hex8(crc32c(body)) << "\n";
}

}  // namespace lockstep::format
