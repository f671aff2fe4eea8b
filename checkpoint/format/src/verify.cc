// What reads a whole checkpoint: digests and verification, tensor by tensor on several threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <exception>
#include <mutex>
#include <thread>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

namespace lockstep::format {
namespace {

uint64_t bytes_of(const StoredTensor& tensor) {
  return static_cast<uint64_t>(Box::whole(tensor.shape).numel() * item_bytes(tensor.dtype));
}

// What one thread does alone; it must not throw.
struct Part {
  uint64_t bytes = 0;
  std::function<void()> work;
};

void run_all(std::vector<Part> parts, int threads, const ProgressCallback& progress) {
  uint64_t total = 0;
  for (const Part& part : parts) total += part.bytes;
  // Large ones first, so that no thread is left alone with a large one at the end.
  std::stable_sort(parts.begin(), parts.end(), [](const auto& a, const auto& b) { return a.bytes > b.bytes; });
  std::atomic<size_t> next{0};
  std::mutex mutex;
  uint64_t done = 0;
  const auto take_parts = [&] {
    for (size_t i = next++; i < parts.size(); i = next++) {
      parts[i].work();
      const std::lock_guard lock(mutex);
      done += parts[i].bytes;
      if (progress) progress(done, total);
    }
  };
  if (threads <= 0) threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 8U));
  std::vector<std::jthread> pool;
  for (int i = 1; i < std::min<int>(threads, static_cast<int>(parts.size())); ++i) pool.emplace_back(take_parts);
  take_parts();
}

// Empty when the manifest is the one that was expected, and vouches for every shard.
std::string doubt(const Reader& reader, const std::string& expected) {
  const std::string manifest = "'" + reader.path() + "/" + kManifestName + "'";
  if (reader.manifest_sha256() != expected) {
    return manifest + " has the SHA-256 " + reader.manifest_sha256() + ", expected was " + expected +
           ": it is another checkpoint, or somebody changed it";
  }
  for (const StoredFile& file : reader.manifest().files) {
    if (file.sha256.empty()) {
      return manifest + " has no SHA-256 of '" + file.name +
             "', so nothing vouches for that. Mend: train with --checkpoint_sha256; without --expect_sha256 its CRCs "
             "are checked";
    }
  }
  return "";
}

}  // namespace

CheckpointDigests compute_digests(const Reader& reader, const ProgressCallback& progress, int threads) {
  CheckpointDigests digests;
  std::mutex mutex;
  std::exception_ptr failure;
  const auto take_digest = [&](const std::string& key) {
    try {
      const std::string value = reader.tensor_digest(key);
      const std::lock_guard lock(mutex);
      digests.tensors[key] = value;
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
  };
  std::vector<Part> parts;
  for (const auto& [key, tensor] : reader.manifest().tensors)
    parts.push_back({bytes_of(tensor), [&, &key = key] { take_digest(key); }});
  run_all(std::move(parts), threads, progress);
  if (failure) std::rethrow_exception(failure);
  std::string weights, optimizer;
  for (const auto& [key, tensor] : reader.manifest().tensors) {  // a map: key order
    std::string line = key + " " + tensor.dtype;
    for (const int64_t size : tensor.shape) line += " " + std::to_string(size);
    (is_weights_section(section_of(key)) ? weights : optimizer) += line + " " + digests.tensors[key] + "\n";
  }
  digests.weights = digest(weights);
  digests.optimizer = digest(optimizer);
  return digests;
}

bool is_damage(const IoError& error) {
  constexpr std::array<int, 4> kNoSuchFile = {ENOENT, ENOTDIR, ELOOP, EINVAL};
  return std::find(kNoSuchFile.begin(), kNoSuchFile.end(), error.error_number()) != kNoSuchFile.end();
}

std::vector<std::string> verify(Fs& fs, const std::string& path, const ProgressCallback& progress, int threads,
                                Authenticity* authenticity) {
  std::vector<std::string> problems;
  std::exception_ptr no_answer;
  std::mutex mutex;
  const auto note = [&](const std::function<void()>& check) {
    try {
      check();
    } catch (const IoError& error) {
      const std::lock_guard lock(mutex);
      if (!is_damage(error)) no_answer = std::current_exception();
      problems.emplace_back(error.what());
    } catch (const std::exception& error) {
      const std::lock_guard lock(mutex);
      problems.emplace_back(error.what());
    }
  };
  try {
    const Reader reader(fs, path, Trust::kAny);
    const Manifest& manifest = reader.manifest();
    if (authenticity != nullptr) {
      authenticity->found = reader.manifest_sha256();
      const std::string reason = authenticity->expected.empty() ? "" : doubt(reader, authenticity->expected);
      if (!reason.empty()) return {reason};
    }
    std::vector<Part> parts;
    for (const auto& [key, tensor] : manifest.tensors) {
      parts.push_back({bytes_of(tensor), [&, &key = key] { note([&] { reader.verify_tensor(key); }); }});
    }
    for (size_t file = 0; file < manifest.files.size(); ++file) {
      if (manifest.files[file].sha256.empty()) continue;
      parts.push_back({manifest.files[file].bytes, [&, file] { note([&] { reader.verify_sha256(file); }); }});
    }
    run_all(std::move(parts), threads, progress);
  } catch (const IoError& error) {
    if (!is_damage(error)) throw;
    problems.emplace_back(error.what());
  } catch (const Error& error) {
    problems.emplace_back(error.what());
  }
  if (no_answer) std::rethrow_exception(no_answer);
  std::sort(problems.begin(), problems.end());
  return problems;
}

}  // namespace lockstep::format
