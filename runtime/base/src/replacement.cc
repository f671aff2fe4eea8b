#include <cstdio>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/base/replacement.h>

namespace lockstep {

Replacement::Replacement(Fs& fs, std::string path, uint64_t epoch, const std::string& text)
    : fs_(fs), path_(std::move(path)), epoch_(epoch) {
  fs_.remove_file(aside());  // of a start whose epoch was forgotten
  file_ = fs_.create_exclusive(aside());
  file_->write_at(0, std::as_bytes(std::span(text.data(), text.size())));
  file_->sync();
}

Replacement::~Replacement() {
  if (is_published_) return;
  try {
    fs_.remove_file(aside());
  } catch (const IoError& error) {
    LOG(WARNING) << error.what() << "; a later start removes it";
  }
}

void Replacement::publish() {
  fs_.replace_file(aside(), path_);
  is_published_ = true;
  const size_t slash = path_.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash);
  fs_.sync_directory(folder);
  const std::string own = aside().substr(slash + 1), ours = path_.substr(slash + 1) + ".e", inside = folder + "/";
  for (const std::string& name : fs_.list_directory(folder)) {
    const bool is_older = name.size() < own.size() || (name.size() == own.size() && name < own);
    if (name.starts_with(ours) && is_older) fs_.remove_file(inside + name);
  }
}

std::string Replacement::aside() const {
  char suffix[24];
  std::snprintf(suffix, sizeof(suffix), ".e%04llu", static_cast<unsigned long long>(epoch_));
  return path_ + suffix;
}

}  // namespace lockstep
