#include "profile.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <vector>

#include <unistd.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>

namespace lockstep::train {
namespace {

constexpr size_t kMaxEvents = size_t{1} << 18;  // a rank; taken when the first step begins
constexpr int kClockExchanges = 8;
constexpr int kTag = 7'201;

bool parse_number(std::string_view text, int64_t& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size();
}

// Rank 0 and another rank tell each other plain bytes, wherever the group wants its tensors.
class Line {
 public:
  Line(ProcessGroup& world, int peer, at::Device device, Milliseconds timeout)
      : world_(world), peer_(peer), device_(device), timeout_(timeout) {}

  void send(const void* data, size_t bytes) {
    const at::Tensor host = at::from_blob(const_cast<void*>(data), {static_cast<int64_t>(bytes)}, at::kByte);
    world_.send(host.to(device_), peer_, kTag, timeout_).wait();
  }
  void receive(void* data, size_t bytes) {
    const at::Tensor there = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).device(device_));
    world_.recv(there, peer_, kTag, timeout_).wait();
    const at::Tensor host = there.cpu();
    std::memcpy(data, host.const_data_ptr(), bytes);
  }

 private:
  ProcessGroup& world_;
  int peer_;
  at::Device device_;
  Milliseconds timeout_;
};

}  // namespace

StepRange parse_steps(const std::string& text) {
  if (text.empty()) return {};
  StepRange steps;
  const size_t colon = text.find(':');
  const std::string_view all = text;
  const bool ok = colon != std::string::npos && parse_number(all.substr(0, colon), steps.first) &&
                  parse_number(all.substr(colon + 1), steps.last) && steps.first >= 1 && steps.last >= steps.first;
  if (!ok)
    throw ConfigError("--profile_steps=" + text + " is no range of steps. Mend: first and last step, like 10:12");
  return steps;
}

Profile::Profile(ProcessGroup& world, at::Device device, Fs& fs, std::string directory, StepRange steps,
                 Milliseconds timeout)
    : world_(world),
      device_(device),
      fs_(fs),
      directory_(std::move(directory)),
      steps_(steps),
      timeout_(timeout),
      trace_(kMaxEvents) {}

void Profile::begin_step(int64_t done) {
  const int64_t step = done + 1;
  if (trace_.is_on() || steps_.is_empty() || step < steps_.first) return;
  if (step > steps_.last) {
    LOG_IF(WARNING, world_.rank() == 0) << "no trace: step " << steps_.last << " lies behind this start";
    steps_ = {};
    return;
  }
  first_done_ = step;
  trace_.start();
}

void Profile::end_step(int64_t done, bool ends) {
  if (!trace_.is_on() || (done < steps_.last && !ends)) return;
  trace_.stop();
  write({first_done_, done});
  steps_ = {};
}

void Profile::write(StepRange steps) {
  if (world_.rank() != 0) {
    take_from(0);
    return;
  }
  std::vector<std::string> ranks = {trace_.take_bytes()};
  for (int rank = 1; rank < world_.size(); ++rank) ranks.push_back(take_from(rank));
  const std::string path =
      directory_ + "/step-" + std::to_string(steps.first) + "-" + std::to_string(steps.last) + ".json";
  try {
    if (!fs_.exists(directory_)) fs_.make_directory(directory_);
    fs_.remove_file(path);  // of an earlier start
    metrics::write_chrome_trace(fs_, path, ranks);
    LOG(INFO) << "trace of steps " << steps.first << " to " << steps.last << ": " << path;
  } catch (const IoError& error) {
    LOG(WARNING) << "the trace of steps " << steps.first << " to " << steps.last << " is lost: " << error.what();
  }
}

// Between rank 0 and one other: compares clocks where hosts differ, then hands the other's events to rank 0.
std::string Profile::take_from(int peer) {
  Line line(world_, peer, device_, timeout_);
  const bool takes = world_.rank() == 0;
  std::array<char, 256> host{}, other{};
  gethostname(host.data(), host.size() - 1);
  if (takes) {
    line.receive(other.data(), other.size());
    line.send(host.data(), host.size());
  } else {
    line.send(host.data(), host.size());
    line.receive(other.data(), other.size());
  }
  const int64_t offset_ns = host == other ? 0 : clock_offset_to(peer);
  std::string bytes;
  if (!takes) bytes = trace_.take_bytes(offset_ns);
  uint64_t size = bytes.size();
  if (takes) {
    line.receive(&size, sizeof(size));
    bytes.resize(size);
    line.receive(bytes.data(), size);
  } else {
    line.send(&size, sizeof(size));
    line.send(bytes.data(), size);
  }
  return bytes;
}

// Rank 0's clock minus this rank's; 0 on rank 0.
int64_t Profile::clock_offset_to(int peer) {
  Line line(world_, peer, device_, timeout_);
  std::vector<metrics::ClockExchange> exchanges(kClockExchanges);
  for (auto& exchange : exchanges) {
    std::array<int64_t, 2> reply{};
    if (world_.rank() == 0) {
      line.receive(&exchange.sent_ns, sizeof(int64_t));
      reply[0] = trace_.now_ns();
      reply[1] = trace_.now_ns();
      line.send(reply.data(), sizeof(reply));
      continue;
    }
    exchange.sent_ns = trace_.now_ns();
    line.send(&exchange.sent_ns, sizeof(int64_t));
    line.receive(reply.data(), sizeof(reply));
    exchange.returned_ns = trace_.now_ns();
    exchange.received_ns = reply[0];
    exchange.replied_ns = reply[1];
  }
  return world_.rank() == 0 ? 0 : metrics::clock_offset_ns(exchanges);
}

}  // namespace lockstep::train
