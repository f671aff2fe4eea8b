#include "http.h"

#include <algorithm>
#include <cstring>

namespace lockstep::metrics {
namespace {

bool is_token(std::string_view text) {
  return !text.empty() && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
           (c != 0 && std::strchr("!#$%&'*+-.^_`|~", c) != nullptr);
  });
}

// Of a header field's value: no control characters but the tab.
bool is_field_text(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](unsigned char c) { return (c < 0x20 && c != '\t') || c == 0x7f; });
}

// Of the first line, which may be cut short.
bool is_visible(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c >= 0x20 && c < 0x7f; });
}

// Takes a line, without its end, off the front of `bytes`; false if none has ended yet. A bare line feed ends one too.
bool take_line(std::string_view& bytes, std::string_view& line) {
  const size_t end = bytes.find('\n');
  if (end == std::string_view::npos) return false;
  line = bytes.substr(0, end);
  if (line.ends_with('\r')) line.remove_suffix(1);
  bytes.remove_prefix(end + 1);
  return true;
}

Verdict judge_first_line(std::string_view line) {
  const size_t first = line.find(' '), second = line.find(' ', first + 1);
  if (first == std::string_view::npos || second == std::string_view::npos) return {400};
  const std::string_view method = line.substr(0, first), version = line.substr(second + 1);
  std::string_view target = line.substr(first + 1, second - first - 1);
  if (!is_visible(line) || !is_token(method) || target.empty()) return {400};
  if (version.size() != 8 || !version.starts_with("HTTP/")) return {400};
  if (!version.starts_with("HTTP/1.")) return {505};
  const bool is_head = method == "HEAD";
  if (!is_head && method != "GET") return {405};
  target = target.substr(0, target.find('?'));
  if (target == "/metrics") return {200, Page::kMetrics, is_head};
  if (target == "/healthz") return {200, Page::kHealth, is_head};
  return {404, Page::kMetrics, is_head};
}

const char* reason(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 414:
      return "URI Too Long";
    case 431:
      return "Request Header Fields Too Large";
    case 503:
      return "Service Unavailable";
    default:
      return "HTTP Version Not Supported";
  }
}

}  // namespace

Verdict judge_request(std::string_view bytes) {
  const bool is_all = bytes.size() >= kMaxRequestBytes;  // no more of it is looked at
  bytes = bytes.substr(0, kMaxRequestBytes);
  std::string_view line;
  if (!take_line(bytes, line)) {
    if (bytes.ends_with('\r')) bytes.remove_suffix(1);
    if (!is_visible(bytes)) return {400};  // e.g. TLS, which would wait for us
    return {is_all ? 414 : 0};
  }
  const Verdict verdict = judge_first_line(line);
  if (verdict.status != 200) return verdict;
  while (take_line(bytes, line)) {
    if (line.empty()) return verdict;
    const size_t colon = line.find(':');
    if (!is_token(line.substr(0, colon)) || colon == std::string_view::npos) return {400};
    if (!is_field_text(line.substr(colon + 1))) return {400};
  }
  return {is_all ? 431 : 0};
}

std::string http_answer(int status, std::string_view body, bool is_head, bool is_exposition) {
  std::string text = "HTTP/1.1 " + std::to_string(status) + " " + reason(status) + "\r\nContent-Type: text/plain; " +
                     (is_exposition ? "version=0.0.4; " : "") +
                     "charset=utf-8\r\nContent-Length: " + std::to_string(body.size()) + "\r\n" +
                     (status == 405 ? "Allow: GET, HEAD\r\n" : "") +
                     "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n";
  return is_head ? text : text.append(body);
}

std::string http_refusal(int status, bool is_head) {
  return http_answer(status, std::to_string(status) + " " + reason(status) + "\n", is_head);
}

}  // namespace lockstep::metrics
