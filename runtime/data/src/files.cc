#include "files.h"

#include <sys/stat.h>
#include <unistd.h>

#include <glob.h>

#include <lockstep/base/error.h>

namespace lockstep::data {

std::vector<std::string> expand_files(const std::string& pattern) {
  if (pattern.empty()) throw ConfigError("no data files are named. Mend: set --train_data to a file or glob");
  glob_t found{};
  const int result = ::glob(pattern.c_str(), 0, nullptr, &found);
  std::vector<std::string> files(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  ::globfree(&found);
  if (result != 0 || files.empty())
    throw ConfigError("no file matches '" + pattern + "'. Mend: check the path; examples come with a fetch_data.sh");
  for (const std::string& file : files) {
    struct stat status {};
    if (::stat(file.c_str(), &status) != 0 || ::access(file.c_str(), R_OK) != 0)
      throw ConfigError("'" + file + "' cannot be read. Mend: check its permissions");
    if (!S_ISREG(status.st_mode))
      throw ConfigError("'" + file + "' is no regular file. Mend: name the files in it, e.g. with /*.bin");
    if (status.st_size == 0) throw ConfigError("'" + file + "' is empty. Mend: make it again");
  }
  return files;
}

}  // namespace lockstep::data
