#include <cinttypes>
#include <cmath>
#include <cstdio>

#include <nlohmann/json.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <lockstep/base/error.h>
#include <lockstep/metrics/run_log.h>

namespace lockstep::metrics {
namespace {

constexpr uint64_t kLimitBytes = uint64_t{4} << 30;

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (size_t start = 0; start < text.size();) {
    const size_t end = text.find('\n', start);
    if (end == std::string::npos) break;  // a torn last line is dropped
    lines.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return lines;
}

// 17 digits: the reader gets the same bits back. JSON has no nan.
std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return text;
}

std::string hash_of(const std::string& text) {
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  char hex[33];
  std::snprintf(hex, sizeof(hex), "%016" PRIx64 "%016" PRIx64, hash.high64, hash.low64);
  return hex;
}

// A text file written line by line at its end.
class LineFile {
 public:
  LineFile(Fs& fs, const std::string& path) : file_(fs.open_append(path)), end_(file_->size()) {}
  void append(const std::string& text) {
    file_->write_at(end_, std::as_bytes(std::span(text.data(), text.size())));
    end_ += text.size();
  }
  void sync() { file_->sync(); }

 private:
  std::unique_ptr<File> file_;
  uint64_t end_;
};

// Replaces the file by `text`. Metrics may be lost in a crash just here; steps after the last checkpoint come again
// anyway.
void rewrite(Fs& fs, const std::string& path, const std::string& text) {
  fs.remove_file(path);
  write_durable(fs, path, text);
}

}  // namespace

class MetricsFile::Impl {
 public:
  Impl(Fs& fs, const std::string& path, int64_t resume_step) : file_(fs, cut(fs, path, resume_step)) {}
  void append(const std::string& line) { pending_ += line; }
  void flush() {
    file_.append(pending_);
    pending_.clear();
  }
  size_t pending() const { return pending_.size(); }

 private:
  static const std::string& cut(Fs& fs, const std::string& path, int64_t resume_step) {
    if (!fs.exists(path)) return path;
    std::string kept;
    const std::string text = read_text(fs, path, kLimitBytes);
    for (const std::string& line : lines_of(text)) {
      const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (json.is_object() && json.value("step", INT64_MAX) <= resume_step) kept += line + "\n";
    }
    if (kept != text) rewrite(fs, path, kept);
    return path;
  }

  LineFile file_;
  std::string pending_;
};

MetricsFile::MetricsFile(Fs& fs, const std::string& path, int64_t resume_step)
    : impl_(std::make_unique<Impl>(fs, path, resume_step)) {}

MetricsFile::~MetricsFile() {
  try {
    flush();
  } catch (const Error&) {  // a full disk must not turn the end of a run into a crash
  }
}

void MetricsFile::append(int64_t step, const Scalars& scalars) {
  std::string line = "{\"step\":" + std::to_string(step);
  for (const auto& [name, value] : scalars) line += ",\"" + name + "\":" + number(value);
  impl_->append(line + "}\n");
  if (impl_->pending() > 1 << 12) flush();
}

void MetricsFile::flush() { impl_->flush(); }

class Ledger::Impl {
 public:
  Impl(Fs& fs, const std::string& path) : last_(check(fs, path)), file_(fs, path) {}

  void append(const std::string& event, const std::string& fields_json) {
    nlohmann::ordered_json line = {{"event", event}, {"unix_s", static_cast<int64_t>(std::time(nullptr))}};
    line.update(nlohmann::ordered_json::parse(fields_json));
    line["previous"] = last_;
    const std::string text = line.dump();
    file_.append(text + "\n");
    file_.sync();
    last_ = hash_of(text);
  }

 private:
  // Follows the chain and returns the hash of the last line. A torn last line is cut off: its event was never reported.
  static std::string check(Fs& fs, const std::string& path) {
    std::string last = "start";
    if (!fs.exists(path)) return last;
    const std::string text = read_text(fs, path, kLimitBytes);
    std::string kept;
    int number = 0;
    for (const std::string& line : lines_of(text)) {
      ++number;
      const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!json.is_object() || json.value("previous", "") != last) {
        throw CorruptData("the ledger '" + path + "' was changed: line " + std::to_string(number) +
                          " does not follow the one before. Mend: restore it, or move it away to start a new one");
      }
      last = hash_of(line);
      kept += line + "\n";
    }
    if (kept != text) rewrite(fs, path, kept);
    return last;
  }

  std::string last_;
  LineFile file_;
};

Ledger::Ledger(Fs& fs, const std::string& path) : impl_(std::make_unique<Impl>(fs, path)) {}
Ledger::~Ledger() = default;
void Ledger::append(const std::string& event, const std::string& fields_json) { impl_->append(event, fields_json); }

}  // namespace lockstep::metrics
