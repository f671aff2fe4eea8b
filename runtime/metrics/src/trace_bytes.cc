#include "trace_bytes.h"

#include <cstring>

#include <lockstep/base/error.h>

namespace lockstep::metrics {
namespace {

constexpr uint32_t kMagic = 0x3152544c;  // "LTR1"

template <typename T>
void put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void put(std::string& out, const std::vector<std::string>& texts) {
  put(out, static_cast<uint32_t>(texts.size()));
  for (const auto& text : texts) {
    put(out, static_cast<uint32_t>(text.size()));
    out += text;
  }
}

[[noreturn]] void refuse(const std::string& what) { throw CorruptData("a rank's trace " + what); }

class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}

  template <typename T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof(value)), sizeof(value));
    return value;
  }
  std::vector<std::string> texts() {
    std::vector<std::string> texts;
    for (auto left = get<uint32_t>(); left > 0; --left) {
      const auto size = get<uint32_t>();
      texts.emplace_back(take(size), size);
    }
    return texts;
  }

 private:
  const char* take(size_t size) {
    if (size > bytes_.size() - at_) refuse("ends at byte " + std::to_string(bytes_.size()) + ", in the middle");
    at_ += size;
    return bytes_.data() + at_ - size;
  }

  const std::string& bytes_;
  size_t at_ = 0;
};

}  // namespace

std::string TraceBytes::written() const {
  std::string out;
  put(out, kMagic);
  put(out, num_dropped);
  put(out, tracks);
  put(out, texts);
  put(out, static_cast<uint32_t>(events.size()));
  for (const Event& event : events) {
    for (const uint32_t field : {event.name, event.category, event.track, event.num_args}) put(out, field);
    put(out, event.begin_ns);
    put(out, event.duration_ns);
    for (uint32_t i = 0; i < event.num_args; ++i) {
      put(out, event.args[i].name);
      put(out, event.args[i].value);
    }
  }
  return out;
}

TraceBytes TraceBytes::read(const std::string& bytes) {
  Reader in(bytes);
  TraceBytes out;
  if (in.get<uint32_t>() != kMagic) refuse("does not begin like one");
  out.num_dropped = in.get<int64_t>();
  out.tracks = in.texts();
  out.texts = in.texts();
  const auto check = [&](uint32_t number, const std::vector<std::string>& of) {
    if (number >= of.size()) refuse("names text " + std::to_string(number) + " of " + std::to_string(of.size()));
    return number;
  };
  for (auto left = in.get<uint32_t>(); left > 0; --left) {
    Event event{};
    event.name = check(in.get<uint32_t>(), out.texts);
    event.category = check(in.get<uint32_t>(), out.texts);
    event.track = check(in.get<uint32_t>(), out.tracks);
    event.num_args = in.get<uint32_t>();
    if (event.num_args > event.args.size()) refuse("has an event with " + std::to_string(event.num_args) + " numbers");
    event.begin_ns = in.get<int64_t>();
    event.duration_ns = in.get<int64_t>();
    for (uint32_t i = 0; i < event.num_args; ++i) {
      event.args[i].name = check(in.get<uint32_t>(), out.texts);
      event.args[i].value = in.get<int64_t>();
    }
    out.events.push_back(event);
  }
  return out;
}

}  // namespace lockstep::metrics
