// Any bytes as a request to the metrics endpoint, whole and as far as they have arrived: a verdict, once there is one,
// stays; too many bytes always get one; and what is let in is what it should be, by another way of looking.
#include <algorithm>
#include <string_view>

#include "fuzz_target.h"
#include "http.h"

namespace lockstep::metrics {
namespace {

bool is_one_of(int status, std::initializer_list<int> all) {
  return std::find(all.begin(), all.end(), status) != all.end();
}

void check_let_in(const Verdict& verdict, std::string_view bytes) {
  const std::string_view first = bytes.substr(0, bytes.find('\n')),
                         path = verdict.page == Page::kMetrics ? "/metrics" : "/healthz";
  const std::string start = std::string(verdict.is_head ? "HEAD " : "GET ").append(path);
  FUZZ_CHECK(first.starts_with(start + " HTTP/1.") || first.starts_with(start + "?"));
  const size_t end = std::min(bytes.find("\n\n"), bytes.find("\n\r\n"));
  FUZZ_CHECK(end < kMaxRequestBytes);
  FUZZ_CHECK(bytes.substr(0, end).find('\0') == std::string_view::npos);
}

void check(std::string_view bytes) {
  const Verdict whole = judge_request(bytes);
  FUZZ_CHECK(is_one_of(whole.status, {0, 200, 400, 404, 405, 414, 431, 505}));
  FUZZ_CHECK(whole.status != 0 || bytes.size() < kMaxRequestBytes);
  if (whole.status == 200) check_let_in(whole, bytes);
  FUZZ_CHECK(http_refusal(whole.status, whole.is_head).starts_with("HTTP/1.1 "));
  // Every way to cut it in two, but of long ones a sample.
  for (size_t size = 0; size < bytes.size(); size += 1 + size / 64) {
    const Verdict part = judge_request(bytes.substr(0, size));
    FUZZ_CHECK(part.status == 0 || part == whole);
  }
}

}  // namespace
}  // namespace lockstep::metrics

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::metrics;
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  check(bytes);
  if (bytes.empty()) return 0;
  // Inputs are short: with more behind it a request reaches the limits too.
  const std::string longer = std::string(bytes).append(kMaxRequestBytes, bytes.back());
  const Verdict verdict = judge_request(bytes), of_longer = judge_request(longer);
  FUZZ_CHECK(of_longer.status != 0 && (verdict.status == 0 || verdict == of_longer));
  FUZZ_CHECK(judge_request(std::string_view(longer).substr(0, kMaxRequestBytes)) == of_longer);
  return 0;
}
