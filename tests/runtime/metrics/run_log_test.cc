// metrics.jsonl and ledger.jsonl: what stands in them after resumes, crashes, faults and edits.
#include <cerrno>
#include <cmath>
#include <limits>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/metrics/run_log.h>

#include "temp_dir.h"

namespace lockstep::metrics {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

std::string text_of(const std::string& path) { return read_text(real_fs(), path, 1 << 24); }

std::vector<std::string> lines_of(const std::string& path) {
  std::vector<std::string> lines;
  std::istringstream text(text_of(path));
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  return lines;
}

void replace(const std::string& path, const std::string& text) {
  real_fs().remove_file(path);
  write_durable(real_fs(), path, text);
}

std::vector<int64_t> steps_in(const std::string& path) {
  std::vector<int64_t> steps;
  for (const std::string& line : lines_of(path)) steps.push_back(json::parse(line).at("step"));
  return steps;
}

class MetricsFileTest : public testing::Test {
 protected:
  void run(int64_t resume_step, int64_t last_step) {
    MetricsFile file(real_fs(), path_, resume_step, ++epoch_);
    file.publish();
    for (int64_t step = std::max<int64_t>(resume_step, 0) + 1; step <= last_step; ++step)
      file.append(step, {{"loss", 1.0 / static_cast<double>(step)}});
  }

  TempDir dir_;
  std::string path_ = dir_ / "metrics.jsonl";
  uint64_t epoch_ = 0;
};

TEST_F(MetricsFileTest, ALineHoldsTheFiguresOfAStepInOrderAndBitForBit) {
  const double third = 1.0 / 3, tiny = 4.9406564584124654e-324;
  {
    MetricsFile file(real_fs(), path_, 0, 1);
    file.publish();
    file.append(1, {{"loss", third}, {"grad_norm", std::nan("")}, {"a", -0.0}});
    file.append(2, {{"loss", tiny}, {"grad_norm", std::numeric_limits<double>::infinity()}});
    file.append(3, {});
  }
  const auto lines = lines_of(path_);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0], R"({"step":1,"loss":0.33333333333333331,"grad_norm":null,"a":-0})");
  EXPECT_EQ(json::parse(lines[0]).at("loss").get<double>(), third);
  EXPECT_EQ(json::parse(lines[1]).at("loss").get<double>(), tiny);
  EXPECT_EQ(lines[2], R"({"step":3})");
}

TEST_F(MetricsFileTest, AResumeDropsTheStepsThatComeAgain) {
  run(-1, 5);
  run(3, 7);
  EXPECT_THAT(steps_in(path_), ElementsAre(1, 2, 3, 4, 5, 6, 7));
  run(0, 1);
  EXPECT_THAT(steps_in(path_), ElementsAre(1));
}

// As after SIGSTOP, --take_over and SIGCONT.
TEST_F(MetricsFileTest, AnOlderStartThatStillWritesHarmsNoLineOfANewerOne) {
  MetricsFile older(real_fs(), path_, 0, ++epoch_);
  older.publish();
  older.append(1, {{"loss", 1}});
  older.flush();
  older.append(2, {{"loss", 0.123456789}});  // waits in memory
  run(1, 4);
  older.append(3, {{"loss", 0.1}});
  older.flush();
  EXPECT_THAT(steps_in(path_), ElementsAre(1, 2, 3, 4));
}

TEST_F(MetricsFileTest, LinesThatAreTornOrNoMetricsGo) {
  write_durable(real_fs(), path_,
                "{\"step\":1}\nrubbish\n[2]\n{\"step\":\"3\"}\n{\"loss\":1}\n{\"step\":2}\n{\"step\":3");
  run(4, 4);
  EXPECT_THAT(steps_in(path_), ElementsAre(1, 2));
}

TEST_F(MetricsFileTest, FlushedLinesAreThereBeforeTheEnd) {
  MetricsFile file(real_fs(), path_, 0, 1);
  file.publish();
  file.append(1, {});
  file.flush();
  EXPECT_THAT(steps_in(path_), ElementsAre(1));
}

TEST_F(MetricsFileTest, LinesWaitWhereADiskIsFull) {
  bool full = false;
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string&, int64_t) {
    return full && kind == "write" ? Fault{.error_number = ENOSPC, .short_bytes = 4} : Fault{};
  });
  MetricsFile file(fs, path_, 0, 1);
  file.publish();
  full = true;
  file.append(1, {});
  EXPECT_NO_THROW(file.flush());
  EXPECT_NO_THROW(file.append(1000, {{"much", 0.1}}));
  full = false;
  file.append(2, {});
  file.flush();
  EXPECT_THAT(steps_in(path_), ElementsAre(1, 1000, 2));
}

TEST_F(MetricsFileTest, ACrashAtAnyCallOfAResumeLosesNoKeptStep) {
  for (int64_t k = 0;; ++k) {
    replace(path_, "");
    run(0, 5);
    FaultFs fs(real_fs(), [&](const std::string&, const std::string&, int64_t call) {
      return call >= k ? Fault{.error_number = EIO, .short_bytes = 5} : Fault{};  // nothing works from the k-th on
    });
    bool crashed = false;
    try {
      MetricsFile(fs, path_, 3, ++epoch_).publish();
    } catch (const IoError&) {
      crashed = true;
    }
    run(3, 4);
    EXPECT_THAT(steps_in(path_), ElementsAre(1, 2, 3, 4)) << "crash at call " << k;
    EXPECT_THAT(real_fs().list_directory(dir_.path()), ElementsAre("metrics.jsonl"));
    if (!crashed) {
      EXPECT_GT(k, 8) << "the resume rewrites the file";
      break;
    }
  }
}

class LedgerTest : public testing::Test {
 protected:
  void fill(int events) {
    for (int i = 0; i < events; ++i) {
      append(i == 0 ? "start" : "durable", json{{"step", i}}.dump());
    }
  }

  // By a start of its own.
  void append(const std::string& event, const std::string& fields_json = "{}") {
    Ledger ledger(real_fs(), path_, ++epoch_);
    ledger.publish();
    ledger.append(event, fields_json);
  }

  TempDir dir_;
  std::string path_ = dir_ / "ledger.jsonl";
  uint64_t epoch_ = 0;
};

TEST_F(LedgerTest, EachLineSaysItsEventItsFieldsAndTheHashOfTheLineBefore) {
  fill(3);
  const auto lines = lines_of(path_);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(json::parse(lines[0]).at("event"), "start");
  EXPECT_EQ(json::parse(lines[0]).at("previous"), "start");
  EXPECT_EQ(json::parse(lines[2]).at("step"), 2);
  EXPECT_GT(json::parse(lines[2]).at("unix_s"), 1'600'000'000);
  EXPECT_EQ(json::parse(lines[2]).at("previous").get<std::string>().size(), 32u);
  EXPECT_EQ(verify_ledger(real_fs(), path_), 3);
}

TEST_F(LedgerTest, TheHashIsThePublicOne) {
  // XXH3-128 of this very line, as Python's xxhash.xxh3_128_hexdigest gives it.
  write_durable(real_fs(), path_, "{\"previous\":\"start\"}\n");
  append("end");
  EXPECT_EQ(json::parse(lines_of(path_)[1]).at("previous"), "1a4c6610aa3b393691264615a0914c08");
}

TEST_F(LedgerTest, AnyChangedByteTakenLineOrPutInLineIsFound) {
  fill(4);
  const std::string whole = text_of(path_);
  const auto lines = lines_of(path_);
  const size_t last_line = whole.size() - lines[3].size() - 1;
  for (size_t i = 0; i < last_line; i += 3) {
    std::string changed = whole;
    changed[i] = static_cast<char>(changed[i] ^ 1);
    replace(path_, changed);
    EXPECT_THROW(verify_ledger(real_fs(), path_), CorruptData) << "byte " << i;
  }
  for (size_t without = 0; without < 3; ++without) {
    std::string changed;
    for (size_t i = 0; i < lines.size(); ++i) changed += i == without ? "" : lines[i] + "\n";
    replace(path_, changed);
    EXPECT_THROW(verify_ledger(real_fs(), path_), CorruptData) << "without line " << without;
  }
  replace(path_, lines[0] + "\n" + lines[0] + "\n");
  EXPECT_THROW(verify_ledger(real_fs(), path_), CorruptData);
  try {
    const Ledger ledger(real_fs(), path_, 9);
    ADD_FAILURE() << "went on with a broken ledger";
  } catch (const CorruptData& error) {
    EXPECT_THAT(error.what(), HasSubstr("line 2"));
  }
}

TEST_F(LedgerTest, AnOlderStartThatStillWritesBreaksNoChainOfANewerOne) {
  Ledger older(real_fs(), path_, 1);
  older.publish();
  older.append("start", "{}");
  {
    Ledger newer(real_fs(), path_, 2);
    newer.publish();
    newer.append("resume", "{}");
    older.append("durable", R"({"step":7})");
    newer.append("end", "{}");
  }
  older.append("end", "{}");
  EXPECT_EQ(verify_ledger(real_fs(), path_), 3);
}

TEST_F(LedgerTest, ATornLastLineIsCutOffAndTheChainGoesOn) {
  fill(3);
  const std::string whole = text_of(path_);
  const size_t last = whole.rfind('\n', whole.size() - 2) + 1;
  for (size_t length = last; length < whole.size(); length += 7) {
    replace(path_, whole.substr(0, length));
    EXPECT_EQ(verify_ledger(real_fs(), path_), 2);
    append("resume");
    EXPECT_EQ(verify_ledger(real_fs(), path_), 3);
    EXPECT_EQ(json::parse(lines_of(path_)[2]).at("event"), "resume");
  }
}

TEST_F(LedgerTest, AFaultAtAnyCallLosesNoReportedEvent) {
  for (int64_t k = 0;; ++k) {
    for (const int64_t short_bytes : {0, 5, 1000}) {
      replace(path_, "");
      fill(2);
      replace(path_, text_of(path_) + "{\"torn");
      FaultFs fs(real_fs(), [&](const std::string&, const std::string&, int64_t call) {
        return call == k ? Fault{.error_number = EIO, .short_bytes = short_bytes} : Fault{};
      });
      int64_t reported = 2;
      try {
        Ledger ledger(fs, path_, ++epoch_);
        ledger.publish();
        for (int i = 0; i < 3; ++i) {
          try {
            ledger.append("durable", R"({"step": 123456})");
            ++reported;
            ledger.append("end", "{}");
            ++reported;
          } catch (const IoError&) {  // a caller that tries again must not break the chain
          }
        }
      } catch (const IoError&) {
      }
      append("resume");
      EXPECT_GE(verify_ledger(real_fs(), path_), reported + 1) << "fault at call " << k;
      if (fs.calls() <= k) return;
    }
  }
}

TEST_F(LedgerTest, EventsGoOnWhereADiskWasFullForAWhile) {
  int64_t writes = 0;
  FaultFs fs(real_fs(), [&](const std::string& kind, const std::string&, int64_t) {
    const bool fails = kind == "write" && (++writes == 3 || writes == 4);
    return fails ? Fault{.error_number = ENOSPC, .short_bytes = 9} : Fault{};
  });
  Ledger ledger(fs, path_, 1);
  ledger.publish();
  ledger.append("start", "{}");
  EXPECT_THROW(ledger.append("skipped", "{}"), IoError);
  EXPECT_THROW(ledger.append("durable", "{}"), IoError);
  ledger.append("end", "{}");
  EXPECT_EQ(verify_ledger(real_fs(), path_), 4) << "those of the time when it was full are there too";
  EXPECT_THAT(lines_of(path_).back(), HasSubstr("end"));
}

TEST_F(LedgerTest, AnEventIsSyncedBeforeItIsReported) {
  FaultFs fs(real_fs(), [](const std::string&, const std::string&, int64_t) { return Fault{}; });
  Ledger ledger(fs, path_, 1);
  ledger.publish();
  ledger.append("start", "{}");
  EXPECT_EQ(fs.log().back(), "sync " + path_ + ".e0001");
}

TEST_F(LedgerTest, WhatIsNoUtf8IsWrittenAsFarAsItCan) {
  Ledger ledger(real_fs(), path_, 1);
  ledger.publish();
  EXPECT_NO_THROW(ledger.append("start\xff", "{}"));
  EXPECT_EQ(verify_ledger(real_fs(), path_), 1);
}

}  // namespace
}  // namespace lockstep::metrics
