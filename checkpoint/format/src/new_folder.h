#pragma once

#include <string>
#include <vector>

#include <lockstep/base/fs.h>

namespace lockstep::format {

/// A folder that is being filled. What was put into it goes away again unless keep() is reached.
class NewFolder {
 public:
  /// @throws ConfigError it is there already.
  NewFolder(Fs& fs, std::string path);
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;
  ~NewFolder();

  /// The path of a file about to be created.
  std::string add(const std::string& name);
  /// Puts `text` there as the last file, whole or not at all, and makes everything durable: the folder counts as
  /// complete by this file.
  void keep(const std::string& name, const std::string& text);

 private:
  void remove() noexcept;

  Fs& fs_;
  std::string path_;
  std::vector<std::string> files_;
  bool kept_ = false;
};

}  // namespace lockstep::format
