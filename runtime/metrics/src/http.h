#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace lockstep::metrics {

inline constexpr size_t kMaxRequestBytes = 8192;

enum class Page { kMetrics, kHealth };

/// What a request deserves, by the bytes of it that are here.
struct Verdict {
  int status = 0;  ///< 0: more must come; 200: `page`; else it is refused
  Page page = Page::kMetrics;
  bool is_head = false;  ///< asked for with HEAD: the answer has no body
  bool operator==(const Verdict&) const = default;
};

/// GET and HEAD of /metrics and /healthz, with or without a query, HTTP/1.x. Header fields must be well formed and mean
/// nothing to us; a body is not read. 400 no HTTP, 404 another page, 405 another method, 414 and 431 the first line or
/// the rest does not end within kMaxRequestBytes, 505 another version.
///
/// Bytes after those that settled the verdict do not change it; kMaxRequestBytes always do settle it.
/// Source: RFC 9112, sections 2.2, 3 and 5.
Verdict judge_request(std::string_view bytes);

/// A whole answer, after which the connection closes. A page of plain text, of Prometheus' kind if `is_exposition`.
std::string http_answer(int status, std::string_view body, bool is_head, bool is_exposition = false);
/// A refusal, its reason as its page.
std::string http_refusal(int status, bool is_head = false);

}  // namespace lockstep::metrics
