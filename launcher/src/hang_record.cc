#include "hang_record.h"

#include <array>
#include <cstdio>
#include <ctime>

#include <fcntl.h>
#include <unistd.h>

#include <lockstep/base/unique_handle.h>

namespace lockstep::launcher {

void write_hang_record(const std::string& folder, const std::string& host, const flight::Verdict& verdict,
                       std::span<const flight::NodeReport> nodes) {
  if (folder.empty()) return;
  const std::time_t now = std::time(nullptr);
  std::array<char, 32> when{};
  std::tm utc{};
  std::strftime(when.data(), when.size(), "%Y%m%dT%H%M%SZ", ::gmtime_r(&now, &utc));
  const std::string path = folder + "/hang-" + when.data() + "-" + host + ".json";
  const std::string aside = path + ".new", text = flight::verdict_json(verdict, nodes) + "\n";
  const UniqueFd file(::open(aside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0640));
  if (!file) return;
  if (::write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size())) {
    ::rename(aside.c_str(), path.c_str());
  } else {
    ::unlink(aside.c_str());
  }
}

}  // namespace lockstep::launcher
