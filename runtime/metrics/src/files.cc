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
#include <lockstep/base/replacement.h>
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

std::string read_whole(Fs& fs, const std::string& path) {
  return fs.exists(path) ? read_text(fs, path, kLimitBytes) : "";
}

// A text file that goes on with the lines it is given, as a file of this start's own.
class LineFile {
 public:
  LineFile(Fs& fs, const std::string& path, uint64_t epoch, const std::string& kept)
      : file_(fs, path, epoch, kept), end_(kept.size()) {}

  void add(const std::string& line) { pending_ += line; }
  size_t pending() const { return pending_.size(); }

  // After a failure nobody knows how much arrived: the same bytes go to the same place with the next call.
  void flush(bool durably = false) {
    file_.file().write_at(end_, std::as_bytes(std::span(pending_.data(), pending_.size())));
    if (durably) file_.file().sync();
    end_ += pending_.size();
    pending_.clear();
  }

  void publish() { file_.publish(); }

 private:
  Replacement file_;
  uint64_t end_;
  std::string pending_;
};

std::optional<nlohmann::json> parse_object(const std::string& line) {
  auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  return json.is_object() ? std::optional(std::move(json)) : std::nullopt;
}

}  // namespace

class MetricsFile::Impl {
 public:
  Impl(Fs& fs, const std::string& path, int64_t resume_step, uint64_t epoch)
      : path_(path), file_(fs, path, epoch, kept_lines(fs, path, resume_step)) {}
  void append(const std::string& line) { file_.add(line); }
  void flush() {
    try {
      file_.flush();
      is_behind_ = false;
    } catch (const IoError& error) {  // numbers are no reason to stop training
      if (!is_behind_) LOG(WARNING) << error.what() << "; lines wait in memory. Mend: make room in '" << path_ << "'";
      is_behind_ = true;
    }
  }
  void publish() { file_.publish(); }
  size_t pending() const { return file_.pending(); }

 private:
  static std::string kept_lines(Fs& fs, const std::string& path, int64_t resume_step) {
    std::string kept;
    const std::string text = read_whole(fs, path);
    for (const std::string& line : lines_of(text)) {
      const auto json = parse_object(line);
      if (!json || !json->contains("step") || !json->at("step").is_number_integer()) continue;
      if (json->at("step").get<int64_t>() <= resume_step) kept += line + "\n";
    }
    return kept;
  }

  std::string path_;
  LineFile file_;
  bool is_behind_ = false;
};

MetricsFile::MetricsFile(Fs& fs, const std::string& path, int64_t resume_step, uint64_t epoch)
    : impl_(std::make_unique<Impl>(fs, path, resume_step, epoch)) {}

MetricsFile::~MetricsFile() { flush(); }

void MetricsFile::append(int64_t step, const Scalars& scalars) {
  std::string line = "{\"step\":" + std::to_string(step);
  for (const auto& [name, value] : scalars) line += ",\"" + name + "\":" + number(value);
  impl_->append(line + "}\n");
  if (impl_->pending() > 1 << 12) flush();
}

void MetricsFile::flush() { impl_->flush(); }
void MetricsFile::publish() { impl_->publish(); }

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
  Impl(Fs& fs, const std::string& path, uint64_t epoch)
      : Impl(fs, path, epoch, follow_chain(path, read_whole(fs, path))) {}

  void append(const std::string& event, const std::string& fields_json) {
    nlohmann::ordered_json line = {{"event", event}, {"unix_s", static_cast<int64_t>(std::time(nullptr))}};
    line.update(nlohmann::ordered_json::parse(fields_json));
    line["previous"] = last_;
    const std::string text = line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    file_.add(text + "\n");
    last_ = hash_of(text);
    file_.flush(/*durably=*/true);
  }

  void publish() { file_.publish(); }

 private:
  // A torn last line is left out: append() had not returned, so its event was never reported.
  Impl(Fs& fs, const std::string& path, uint64_t epoch, const Chain& chain)
      : file_(fs, path, epoch, chain.kept), last_(chain.last) {}

  LineFile file_;
  std::string last_;  // hash of the last line
};

Ledger::Ledger(Fs& fs, const std::string& path, uint64_t epoch) : impl_(std::make_unique<Impl>(fs, path, epoch)) {}
Ledger::~Ledger() = default;
void Ledger::append(const std::string& event, const std::string& fields_json) { impl_->append(event, fields_json); }
void Ledger::publish() { impl_->publish(); }

}  // namespace lockstep::metrics
