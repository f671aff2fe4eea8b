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

// Calls `work(key)` once for every tensor, from several threads; it must not throw.
void for_each_tensor(const Manifest& manifest, int threads, const ProgressCallback& progress,
                     const std::function<void(const std::string&)>& work) {
  std::vector<std::pair<const std::string*, uint64_t>> tensors;
  uint64_t total = 0;
  for (const auto& [key, tensor] : manifest.tensors) {
    tensors.emplace_back(&key, bytes_of(tensor));
    total += tensors.back().second;
  }
  // Large ones first, so that no thread is left alone with a large one at the end.
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  std::atomic<size_t> next{0};
  std::mutex mutex;
  uint64_t done = 0;
  const auto take_tensors = [&] {
    for (size_t i = next++; i < tensors.size(); i = next++) {
      work(*tensors[i].first);
      const std::lock_guard lock(mutex);
      done += tensors[i].second;
      if (progress) progress(done, total);
    }
  };
  if (threads <= 0) threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1U, 8U));
  std::vector<std::jthread> pool;
  for (int i = 1; i < std::min<int>(threads, static_cast<int>(tensors.size())); ++i) pool.emplace_back(take_tensors);
  take_tensors();
}

}  // namespace

CheckpointDigests compute_digests(const Reader& reader, const ProgressCallback& progress, int threads) {
  CheckpointDigests digests;
  std::mutex mutex;
  std::exception_ptr failure;
  for_each_tensor(reader.manifest(), threads, progress, [&](const std::string& key) {
    try {
      const std::string value = reader.tensor_digest(key);
      const std::lock_guard lock(mutex);
      digests.tensors[key] = value;
    } catch (...) {
      const std::lock_guard lock(mutex);
      failure = std::current_exception();
    }
  });
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

std::vector<std::string> verify(Fs& fs, const std::string& path, const ProgressCallback& progress, int threads) {
  std::vector<std::string> problems;
  std::exception_ptr no_answer;
  std::mutex mutex;
  try {
    const Reader reader(fs, path, Trust::kAny);
    for_each_tensor(reader.manifest(), threads, progress, [&](const std::string& key) {
      try {
        reader.verify_tensor(key);
      } catch (const IoError& error) {
        const std::lock_guard lock(mutex);
        if (!is_damage(error)) no_answer = std::current_exception();
        problems.emplace_back(error.what());
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        problems.emplace_back(error.what());
      }
    });
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
