#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <optional>

#include <nlohmann/json.hpp>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
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

std::string replacement(const std::string& path) { return path + ".new"; }

// Replaces the file by `text`; a crash at any point leaves the old or the new one for read_whole() to find. There is no
// renaming over a file in Fs, so for a moment the new one stands alone under its other name.
void rewrite(Fs& fs, const std::string& path, const std::string& text) {
  fs.remove_file(replacement(path));
  write_durable(fs, replacement(path), text);
  fs.remove_file(path);
  fs.rename_exclusive(replacement(path), path);
  fs.sync_directory(path.substr(0, path.rfind('/')));  // else a power loss may bring the old one back
}

// The whole text of a file of lines, "" when there is none. Ends a replacement that a crash cut short.
std::string read_whole(Fs& fs, const std::string& path) {
  if (fs.exists(path)) {
    fs.remove_file(replacement(path));  // unfinished: the old one still stands
  } else {
    if (!fs.exists(replacement(path))) return "";
    fs.rename_exclusive(replacement(path), path);
  }
  return read_text(fs, path, kLimitBytes);
}

std::optional<nlohmann::json> parse_object(const std::string& line) {
  auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  return json.is_object() ? std::optional(std::move(json)) : std::nullopt;
}

}  // namespace

class MetricsFile::Impl {
 public:
  Impl(Fs& fs, const std::string& path, int64_t resume_step) : path_(path), file_(fs, cut(fs, path, resume_step)) {}
  void append(const std::string& line) { pending_ += line; }
  void flush() {
    try {
      file_.append(pending_);
      pending_.clear();
      is_behind_ = false;
    } catch (const IoError& error) {  // numbers are no reason to stop training
      if (!is_behind_) LOG(WARNING) << error.what() << "; lines wait in memory. Mend: make room in '" << path_ << "'";
      is_behind_ = true;
    }
  }
  size_t pending() const { return pending_.size(); }

 private:
  static const std::string& cut(Fs& fs, const std::string& path, int64_t resume_step) {
    std::string kept;
    const std::string text = read_whole(fs, path);
    for (const std::string& line : lines_of(text)) {
      const auto json = parse_object(line);
      if (!json || !json->contains("step") || !json->at("step").is_number_integer()) continue;
      if (json->at("step").get<int64_t>() <= resume_step) kept += line + "\n";
    }
    // Anew in any case: an older start that was superseded and does not know yet has the old file open, at its old end.
    if (fs.exists(path)) rewrite(fs, path, kept);
    return path;
  }

  std::string path_;
  LineFile file_;
  std::string pending_;
  bool is_behind_ = false;
};

MetricsFile::MetricsFile(Fs& fs, const std::string& path, int64_t resume_step)
    : impl_(std::make_unique<Impl>(fs, path, resume_step)) {}

MetricsFile::~MetricsFile() { flush(); }

void MetricsFile::append(int64_t step, const Scalars& scalars) {
  std::string line = "{\"step\":" + std::to_string(step);
  for (const auto& [name, value] : scalars) line += ",\"" + name + "\":" + number(value);
  impl_->append(line + "}\n");
  if (impl_->pending() > 1 << 12) flush();
}

void MetricsFile::flush() { impl_->flush(); }

namespace {

// What a ledger says as far as its lines are whole.
struct Chain {
  std::string kept;            // its whole lines
  std::string last = "start";  // hash of the last of them
  int64_t events = 0;
};

Chain follow_chain(const std::string& path, const std::string& text) {
  Chain chain;
  for (const std::string& line : lines_of(text)) {
    ++chain.events;
    const auto json = parse_object(line);
    if (!json || !json->contains("previous") || json->at("previous") != chain.last) {
      throw CorruptData("the ledger '" + path + "' was changed: line " + std::to_string(chain.events) +
                        " does not follow the one before. Mend: restore it, or move it away to start a new one");
    }
    chain.last = hash_of(line);
    chain.kept += line + "\n";
  }
  return chain;
}

}  // namespace

std::vector<std::string> read_ledger(Fs& fs, const std::string& path) {
  return lines_of(follow_chain(path, read_whole(fs, path)).kept);
}

int64_t verify_ledger(Fs& fs, const std::string& path) {
  return follow_chain(path, read_text(fs, path, kLimitBytes)).events;
}

class Ledger::Impl {
 public:
  Impl(Fs& fs, const std::string& path)
      : fs_(fs), path_(path), last_(open_chain()), file_(std::make_unique<LineFile>(fs, path)) {}

  void append(const std::string& event, const std::string& fields_json) {
    if (!file_) {  // after a failure nobody knows how much of the line is there, nor whether it will last
      last_ = open_chain();
      file_ = std::make_unique<LineFile>(fs_, path_);
    }
    nlohmann::ordered_json line = {{"event", event}, {"unix_s", static_cast<int64_t>(std::time(nullptr))}};
    line.update(nlohmann::ordered_json::parse(fields_json));
    line["previous"] = last_;
    const std::string text = line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    auto file = std::move(file_);
    file->append(text + "\n");
    file->sync();
    file_ = std::move(file);
    last_ = hash_of(text);
  }

 private:
  // A torn last line is cut off: append() had not returned, so its event was never reported. A file of its own, so that
  // an older start, which has the one before open, writes no more into it.
  std::string open_chain() {
    const Chain chain = follow_chain(path_, read_whole(fs_, path_));
    if (fs_.exists(path_)) rewrite(fs_, path_, chain.kept);
    return chain.last;
  }

  Fs& fs_;
  std::string path_, last_;
  std::unique_ptr<LineFile> file_;  // null after a failure
};

Ledger::Ledger(Fs& fs, const std::string& path) : impl_(std::make_unique<Impl>(fs, path)) {}
Ledger::~Ledger() = default;
void Ledger::append(const std::string& event, const std::string& fields_json) { impl_->append(event, fields_json); }

}  // namespace lockstep::metrics
