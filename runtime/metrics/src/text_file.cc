#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <stop_token>
#include <thread>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/base/unique_handle.h>
#include <lockstep/metrics/endpoint.h>

namespace lockstep::metrics {

class TextFile::Impl {
 public:
  Impl(std::string path, const RunMeter& meter, std::chrono::milliseconds interval)
      : path_(std::move(path)), meter_(meter), interval_(interval) {
    thread_ = std::jthread([this](const std::stop_token& stop) { write_until(stop); });
  }

 private:
  void write_until(const std::stop_token& stop);
  void try_to_write(const std::string& text);
  void replace(const std::string& text) const;

  std::string path_;
  const RunMeter& meter_;
  std::chrono::milliseconds interval_;
  bool is_behind_ = false;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::jthread thread_;  // last: it uses the others
};

void TextFile::Impl::write_until(const std::stop_token& stop) {
  std::string written;
  for (bool is_last = false; !is_last;) {
    is_last = stop.stop_requested();
    if (const std::string text = meter_.exposition(); text != written) {
      try_to_write(text);
      written = is_behind_ ? "" : text;
    }
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, stop, interval_, [] { return false; });  // woken by the stop alone
  }
}

// Figures are no reason to stop training.
void TextFile::Impl::try_to_write(const std::string& text) {
  try {
    replace(text);
    is_behind_ = false;
  } catch (const IoError& error) {
    LOG_IF(WARNING, !is_behind_) << error.what() << "; training goes on. Mend: see --metrics_textfile";
    is_behind_ = true;
  }
}

// Not through Fs: what is written is worth a few seconds, so nothing is synced, and its mode is wider than the umask.
void TextFile::Impl::replace(const std::string& text) const {
  const std::string aside = path_ + ".new";
  const auto check = [&aside](bool is_ok, const char* doing) {
    if (is_ok) return;
    const int error_number = errno;
    unlink(aside.c_str());
    throw IoError(doing, aside, error_number);
  };
  unlink(aside.c_str());  // of a start that was killed
  UniqueFd fd(::open(aside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  check(fd.get() >= 0, "creating");
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = write(fd.get(), text.data() + done, text.size() - done);
    check(n > 0 || errno == EINTR, "writing");
    done += n > 0 ? static_cast<size_t>(n) : 0;
  }
  check(fchmod(fd.get(), 0644) == 0, "opening to all readers");
  check(close(fd.release()) == 0, "closing");
  check(rename(aside.c_str(), path_.c_str()) == 0, "renaming to its place");
}

TextFile::TextFile(std::string path, const RunMeter& meter, std::chrono::milliseconds interval)
    : impl_(std::make_unique<Impl>(std::move(path), meter, interval)) {}
TextFile::~TextFile() = default;

}  // namespace lockstep::metrics
