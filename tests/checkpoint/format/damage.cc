#include <algorithm>
#include <fstream>

#include "written_checkpoint.h"

namespace lockstep::format {
namespace {

namespace fs = std::filesystem;

void put(const fs::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

}  // namespace

std::string damage(const std::string& directory, const std::string& other, std::mt19937& random) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(directory)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  const fs::path victim = files[random() % files.size()];
  const std::string before = slurp(victim);
  std::string after = before, how;
  const size_t at = random() % before.size();
  switch (random() % 8) {
    case 0:
      how = "flip a bit of byte " + std::to_string(at);
      after[at] = static_cast<char>(after[at] ^ (1 << random() % 8));
      break;
    case 1:
      how = "zero 4 KiB from " + std::to_string(at);
      std::fill_n(after.begin() + static_cast<int64_t>(at), std::min<size_t>(4096, after.size() - at), '\0');
      break;
    case 2:
      how = "truncate to " + std::to_string(at);
      after.resize(at);
      break;
    case 3:
      how = "extend";
      after.append(1 + random() % 100, static_cast<char>(random()));
      break;
    case 4: {
      const fs::path rival = files[random() % files.size()];
      how = "swap with " + rival.filename().string();
      after = slurp(rival);
      put(rival, before);
      break;
    }
    case 5: {
      how = "splice the other checkpoint's bytes from " + std::to_string(at);
      const std::string donor = slurp(fs::path(other) / victim.filename());
      after = before.substr(0, at) + (donor.size() > at ? donor.substr(at) : "");
      break;
    }
    case 6: {
      const fs::path rival = files[random() % files.size()];
      how = "put " + rival.filename().string() + " in the place";
      after = slurp(rival);
      break;
    }
    default:
      fs::remove(victim);
      return "delete " + victim.filename().string();
  }
  put(victim, after);
  return after == before ? "" : how + " of " + victim.filename().string();
}

}  // namespace lockstep::format
