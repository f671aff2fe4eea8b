#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <lockstep/base/fs.h>

namespace lockstep {

/// A file on its way to take another's place: until publish() it lies aside, as PATH.e0003 for epoch 3, and everybody
/// else sees what is at PATH. Of two starts on one run each has its own, whatever either is doing meanwhile.
class Replacement {
 public:
  /// Writes `text` aside, synced. @throws IoError.
  Replacement(Fs& fs, std::string path, uint64_t epoch, const std::string& text);
  ~Replacement();  ///< removes what was never published
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;

  /// To go on writing, before and after: it stays this very file, even when another has taken its place.
  File& file() { return *file_; }

  /// Puts it at PATH, durably, and removes what starts of smaller epochs left aside. @throws IoError.
  void publish();

 private:
  std::string aside() const;

  Fs& fs_;
  std::string path_;
  uint64_t epoch_;
  std::unique_ptr<File> file_;
  bool is_published_ = false;
};

}  // namespace lockstep
