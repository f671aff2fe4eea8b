#include <algorithm>
#include <numeric>
#include <utility>

#include <lockstep/base/text.h>

namespace lockstep {
namespace {

constexpr int kFar = 4;  // edits from which on a candidate is no likely slip

int edit_distance(const std::string& a, const std::string& b) {  // Levenshtein, one row
  std::vector<int> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (size_t i = 0; i < a.size(); ++i) {
    int diagonal = std::exchange(row[0], static_cast<int>(i) + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const int changed = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j + 1] + 1, row[j] + 1, changed});
    }
  }
  return row.back();
}

}  // namespace

std::string did_you_mean(const std::string& word, const std::vector<std::string>& candidates,
                         const std::string& prefix) {
  std::string nearest;
  int best = kFar;
  for (const std::string& candidate : candidates) {
    const int distance = edit_distance(word, candidate);
    if (distance < best) best = distance, nearest = candidate;
  }
  return nearest.empty() ? ". Mend: see --help" : ". Mend: did you mean " + prefix + nearest + "?";
}

}  // namespace lockstep
