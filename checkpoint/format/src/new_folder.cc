#include "new_folder.h"

#include <filesystem>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>

namespace lockstep::format {

NewFolder::NewFolder(Fs& fs, std::string path) : fs_(fs), path_(std::move(path)) {
  if (fs_.exists(path_)) throw ConfigError("'" + path_ + "' is there already. Mend: name a new folder");
  const std::string above = std::filesystem::path(path_).parent_path().string(), parent = above.empty() ? "." : above;
  make_directories(fs_, parent);
  fs_.make_directory(path_);
  try {
    fs_.sync_directory(parent);
  } catch (const IoError&) {
    remove();
    throw;
  }
}

NewFolder::~NewFolder() {
  if (!kept_) remove();
}

void NewFolder::remove() noexcept {
  try {
    for (auto file = files_.rbegin(); file != files_.rend(); ++file) fs_.remove_file(*file);
    fs_.remove_directory(path_);
  } catch (const std::exception& error) {
    LOG(WARNING) << "cleaning up '" << path_ << "': " << error.what();
  }
}

std::string NewFolder::add(const std::string& name) {
  files_.push_back(path_ + "/" + name);
  return files_.back();
}

void NewFolder::keep(const std::string& name, const std::string& text) {
  fs_.sync_directory(path_);
  const std::string path = add(name), aside = add(name + ".tmp");
  write_durable(fs_, aside, text);
  fs_.rename_exclusive(aside, path);
  fs_.sync_directory(path_);
  kept_ = true;
}

}  // namespace lockstep::format
