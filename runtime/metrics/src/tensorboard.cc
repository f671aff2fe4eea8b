#include <algorithm>
#include <atomic>
#include <cstdio>
#include <ctime>

#include <sys/time.h>
#include <unistd.h>

#include <isa-l/crc.h>
#include <protozero/pbf_writer.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/metrics/run_log.h>

namespace lockstep::metrics {
namespace {

// Fields of TensorFlow's event.proto and summary.proto that we write.
enum Event : protozero::pbf_tag_type { kWallTime = 1, kStep = 2, kFileVersion = 3, kSummary = 5, kSessionLog = 7 };
enum Summary : protozero::pbf_tag_type { kValue = 1 };
enum Value : protozero::pbf_tag_type { kTag = 1, kSimpleValue = 2 };
enum SessionLog : protozero::pbf_tag_type { kStatus = 1 };
constexpr int kStart = 1;  // SessionLog::START: readers drop older points at this step and later

uint32_t crc32c(const void* data, size_t n) {
  return ~crc32_iscsi(static_cast<unsigned char*>(const_cast<void*>(data)), static_cast<int>(n), 0xffffffffu);
}

uint32_t masked(uint32_t crc) { return ((crc >> 15) | (crc << 17)) + 0xa282ead8u; }

double now_s() {
  timeval time{};
  gettimeofday(&time, nullptr);
  return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
}

}  // namespace

class TensorBoardWriter::Impl {
 public:
  Impl(const std::string& directory, int64_t resume_step) {
    char host[256] = {};
    gethostname(host, sizeof(host) - 1);
    static std::atomic<int> number = 0;  // two writers of one process and second get two names
    char name[400];
    std::snprintf(name, sizeof(name), "/events.out.tfevents.%010lld.%s.%d.%d",
                  static_cast<long long>(std::time(nullptr)), host, getpid(), number++);
    path_ = directory + name;
    file_ = std::fopen(path_.c_str(), "wbex");
    if (file_ == nullptr) throw IoError("creating", path_, errno);
    write(0, [](protozero::pbf_writer& event) { event.add_string(kFileVersion, "brain.Event:2"); });
    // Written by fresh runs too: the one before in this folder may have died before its first checkpoint.
    write(std::max<int64_t>(resume_step, 0) + 1, [](protozero::pbf_writer& event) {
      std::string log;
      protozero::pbf_writer(log).add_enum(kStatus, kStart);
      event.add_message(kSessionLog, log);
    });
    flush();
  }
  ~Impl() { std::fclose(file_); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  template <typename Fill>
  void write(int64_t step, Fill fill) {
    std::string data;
    protozero::pbf_writer event(data);
    event.add_double(kWallTime, now_s());
    event.add_int64(kStep, step);
    fill(event);
    const uint64_t length = data.size();
    const uint32_t length_crc = masked(crc32c(&length, sizeof(length))),
                   data_crc = masked(crc32c(data.data(), data.size()));
    std::fwrite(&length, sizeof(length), 1, file_);
    std::fwrite(&length_crc, sizeof(length_crc), 1, file_);
    std::fwrite(data.data(), 1, data.size(), file_);
    std::fwrite(&data_crc, sizeof(data_crc), 1, file_);
  }

  void flush() {
    std::fflush(file_);
    if (std::ferror(file_) == 0 || warned_) return;
    warned_ = true;  // curves are no reason to stop training; losing them is worth one line
    LOG(WARNING) << "'" << path_
                 << "' cannot be written, the TensorBoard curves from here on are lost. Mend: look for a "
                 << "full disk; metrics.jsonl has the same numbers";
  }

 private:
  std::string path_;
  std::FILE* file_;
  bool warned_ = false;
};

TensorBoardWriter::TensorBoardWriter(const std::string& directory, int64_t resume_step)
    : impl_(std::make_unique<Impl>(directory, resume_step)) {}
TensorBoardWriter::~TensorBoardWriter() = default;

void TensorBoardWriter::scalars(int64_t step, const Scalars& scalars) {
  std::string summary;
  protozero::pbf_writer writer(summary);
  for (const auto& [tag, value] : scalars) {
    std::string one;
    protozero::pbf_writer field(one);
    field.add_string(kTag, tag);
    field.add_float(kSimpleValue, static_cast<float>(value));
    writer.add_message(kValue, one);
  }
  impl_->write(step, [&](protozero::pbf_writer& event) { event.add_message(kSummary, summary); });
}

void TensorBoardWriter::flush() { impl_->flush(); }

}  // namespace lockstep::metrics
