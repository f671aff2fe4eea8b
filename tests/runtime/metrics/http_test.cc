// Requests, judged byte by byte.
#include "http.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep::metrics {
namespace {

using testing::HasSubstr;

const Verdict kWait{0}, kShowMetrics{200, Page::kMetrics, false};

TEST(JudgeRequestTest, PagesAreTwoAndAreFoundByPathAlone) {
  EXPECT_EQ(judge_request("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), kShowMetrics);
  EXPECT_EQ(judge_request("GET /metrics HTTP/1.0\n\n"), kShowMetrics);
  EXPECT_EQ(judge_request("GET /metrics?name[]=a HTTP/1.1\r\nAccept: */*;q=0.5\r\nX-Empty:\r\n\r\nbody"), kShowMetrics);
  EXPECT_EQ(judge_request("GET /healthz HTTP/1.1\r\n\r\n"), (Verdict{200, Page::kHealth, false}));
  EXPECT_EQ(judge_request("HEAD /healthz HTTP/1.1\r\n\r\n"), (Verdict{200, Page::kHealth, true}));
}

TEST(JudgeRequestTest, WhateverElseIsRefusedByItsOwnStatus) {
  const auto status = [](const std::string& bytes) { return judge_request(bytes).status; };
  for (const char* line : {"GET / HTTP/1.1\r\n", "GET /metrics/ HTTP/1.1\r\n", "GET /METRICS HTTP/1.1\r\n",
                           "GET /metrics/../healthz HTTP/1.1\r\n", "GET http://a/metrics HTTP/1.1\r\n",
                           "GET /%6detrics HTTP/1.1\r\n", "HEAD * HTTP/1.1\r\n"})
    EXPECT_EQ(status(line), 404) << line;
  for (const char* method : {"POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "G#T"})
    EXPECT_EQ(status(std::string(method) + " /metrics HTTP/1.1\r\n"), 405) << method;
  for (const char* line : {"\r\n", "GET\r\n", "GET /metrics\r\n", " GET /metrics HTTP/1.1\r\n", "GET  HTTP/1.1\r\n",
                           "GET /metrics  HTTP/1.1\r\n", "GET /metrics HTTP/1.1 \r\n", "GET /metrics HTTP/11\r\n",
                           "GET /metrics http/1.1\r\n", "G(T /metrics HTTP/1.1\r\n", "GET /met\trics HTTP/1.1\r\n",
                           "GET /metrics\xc3\xa9 HTTP/1.1\r\n", "GET /metrics\r HTTP/1.1\r\n"})
    EXPECT_EQ(status(line), 400) << line;
  for (const char* line : {"GET /metrics HTTP/2.0\r\n", "GET /metrics HTTP/0.9\r\n"}) EXPECT_EQ(status(line), 505);
  const std::string get = "GET /metrics HTTP/1.1\r\n";
  for (const char* field :
       {"no colon\r\n", ": nameless\r\n", "spaced name: a\r\n", " folded: a\r\n", "a: \x01\r\n", "a: b\rc\r\n"})
    EXPECT_EQ(status(get + field), 400) << field;
  EXPECT_EQ(status(get + "a: \xc3\xa9\t \r\n\r\n"), 200);
}

TEST(JudgeRequestTest, HalfARequestWaitsForItsRestUnlessItIsWrongAlready) {
  const std::string whole = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n";
  for (size_t size = 0; size < whole.size(); ++size) EXPECT_EQ(judge_request(whole.substr(0, size)), kWait) << size;
  EXPECT_EQ(judge_request(std::string_view("\x16\x03\x01", 3)).status, 400) << "TLS";
  EXPECT_EQ(judge_request(std::string_view("\0", 1)).status, 400);
}

TEST(JudgeRequestTest, NoRequestIsLongerThan8KiB) {
  const std::string path(kMaxRequestBytes, 'a');
  EXPECT_EQ(judge_request(("GET /" + path).substr(0, kMaxRequestBytes - 1)).status, 0);
  EXPECT_EQ(judge_request(("GET /" + path).substr(0, kMaxRequestBytes)).status, 414);
  EXPECT_EQ(judge_request("GET /" + path + " HTTP/1.1\r\n").status, 414);
  std::string many = "GET /metrics HTTP/1.1\r\n";
  while (many.size() + 10 < kMaxRequestBytes) many += "a: bcdef\r\n";
  EXPECT_EQ(judge_request(many + "\r\n").status, 200);
  EXPECT_EQ(judge_request(many).status, 0);
  EXPECT_EQ(judge_request(many + "a: bcdef\r\n\r\n").status, 431);
}

TEST(HttpAnswerTest, SaysItsLengthAndThatNothingFollows) {
  EXPECT_EQ(http_answer(200, "a 1\n", false, true),
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: 4\r\n"
            "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\na 1\n");
  EXPECT_THAT(http_answer(200, "a 1\n", true), testing::EndsWith("\r\n\r\n"));
  EXPECT_THAT(http_answer(200, "a 1\n", true), HasSubstr("Content-Length: 4\r\n"));
  EXPECT_THAT(http_refusal(405), HasSubstr("Allow: GET, HEAD\r\n"));
  EXPECT_THAT(http_refusal(404), testing::EndsWith("\r\n\r\n404 Not Found\n"));
}

}  // namespace
}  // namespace lockstep::metrics
