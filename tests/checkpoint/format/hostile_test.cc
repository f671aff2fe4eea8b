// Checkpoints that somebody made to hurt. The kernel says what was opened and how much memory it took.
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include <malloc.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fault_fs.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/reader.h>

#include "../../support/open_audit.h"
#include "../temp_dir.h"
#include "hostile_checkpoint.h"
#include "written_checkpoint.h"

namespace lockstep::format {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

#ifdef LOCKSTEP_SANITIZED
constexpr bool kSanitized = true;  // memory is the sanitizer's then, and all is slower
#else
constexpr bool kSanitized = false;
#endif
constexpr int64_t kMaxPeakBytes = int64_t{256} << 20;

const int kRounds = kSanitized ? 2'000 : getenv("LOCKSTEP_DEEP") != nullptr ? 1'000'000 : 10'000;

// Opens and reads all of a checkpoint. @return whether it was taken for good.
bool is_taken(Fs& fs, const std::string& path) {
  try {
    return verify(fs, path, {}, 1).empty();
  } catch (const IoError&) {
    return false;
  } catch (const ConfigError&) {
    return false;
  }
}

TEST(OpenAuditTest, SeesWhatIsOpenedWhereItReallyIs) {
  const TempDir directory;
  std::ofstream(directory.path() + "/real") << "x";
  std::filesystem::create_symlink("real", directory.path() + "/link");
  const auto run = audit_opens([&] { return std::ifstream(directory.path() + "/link").get() == 'x' ? 7 : 8; });
  if (!run) GTEST_SKIP() << "this system lets no process trace another";
  EXPECT_EQ(run->exit_code, 7);
  EXPECT_THAT(run->opened, testing::Contains(std::filesystem::canonical(directory.path()).string() + "/real"));
}

TEST(HostileTest, TenThousandCheckpointsOpenNothingElsewhereAndEndInAnErrorOrWhole) {
  const TempDir top(std::filesystem::exists("/dev/shm") ? "/dev/shm" : testing::TempDir());  // a disk takes its time
  const std::string canonical = std::filesystem::canonical(top.path()).string();
  const std::string inside = canonical + "/inside", elsewhere = canonical + "/elsewhere";
  std::filesystem::create_directory(elsewhere);
  HostileCheckpoints hostile(elsewhere, /*seed=*/19);
  const auto all_rounds = [&] {
    int taken = 0;
    for (int round = 0; round < kRounds; ++round) {
      const std::string what = hostile.make(inside);
      alarm(10);  // nothing may wait: a FIFO has no writer
      taken += is_taken(real_fs(), inside) ? 1 : 0;
    }
    // Some spoilings spoil nothing: another digit in a text nobody reads.
    return taken * 4 < kRounds ? 0 : 1;
  };
  const auto run = audit_opens(all_rounds);
  if (!run) GTEST_SKIP() << "this system lets no process trace another; " << ::testing::PrintToString(all_rounds());
  EXPECT_EQ(run->exit_code, 0);
  EXPECT_GT(run->opened.size(), static_cast<size_t>(kRounds));
  const std::set<std::string> files(run->opened.begin(), run->opened.end());
  for (const std::string& file : files) {
    // Files that the spoiler has made anew may be gone by now, not elsewhere.
    EXPECT_TRUE(file == inside || file.starts_with(inside + "/")) << file << " was opened";
  }
  if (!kSanitized) {
    EXPECT_LE(run->peak_rss_bytes, kMaxPeakBytes);
  }
  std::cout << kRounds << " checkpoints, " << run->opened.size() << " files opened, peak "
            << (run->peak_rss_bytes >> 20) << " MiB\n";
}

class ForeignTest : public testing::Test {
 protected:
  void SetUp() override {
    write_checkpoint(directory_.path(), {{"w", "F32", {4}, {Box::whole({4})}}});
    if (::geteuid() != 0) GTEST_SKIP() << "only root gives files away";
  }
  void give_away(const std::string& name) {
    ASSERT_EQ(::chown((directory_.path() + "/" + name).c_str(), 65534, 65534), 0);
  }
  TempDir directory_;
};

TEST_F(ForeignTest, ACheckpointOfAnotherUserIsReadOnlyWhenSomebodySaidSo) {
  EXPECT_FALSE(Reader(real_fs(), directory_.path()).is_foreign());
  for (const std::string& name : {std::string(kManifestName), shard_name(0, 1)}) {
    const TempDir copy;
    std::filesystem::copy(directory_.path(), copy.path());
    ASSERT_EQ(::chown((copy.path() + "/" + name).c_str(), 65534, 65534), 0);
    try {
      const Reader reader(real_fs(), copy.path());
      FAIL() << name;
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(),
                  testing::AllOf(HasSubstr(name), HasSubstr("uid 65534"), HasSubstr("--trust_foreign_checkpoint")));
    }
    const Reader reader(real_fs(), copy.path(), Trust::kAny);
    EXPECT_TRUE(reader.is_foreign());
    EXPECT_THAT(reader.owner_name(), HasSubstr("(uid 65534)"));
    EXPECT_THAT(verify(real_fs(), copy.path()), IsEmpty()) << "looking is free";
  }
}

// A hard link is the file itself: whose it is decides.
TEST_F(ForeignTest, AHardLinkToAnothersFileIsAnothersFile) {
  const TempDir copy;
  std::filesystem::copy(directory_.path(), copy.path());
  const std::string shard = shard_name(0, 1);
  give_away(shard);
  std::filesystem::remove(copy.path() + "/" + shard);
  std::filesystem::create_hard_link(directory_.path() + "/" + shard, copy.path() + "/" + shard);
  EXPECT_THROW(Reader(real_fs(), copy.path()), ConfigError);
}

TEST(ExchangeTest, AShardThatBecomesALinkAfterTheManifestWasReadIsRefused) {
  const TempDir directory, elsewhere;
  const std::vector<WrittenTensor> tensors = {{"w", "F32", {4}, {Box::whole({4})}}};
  write_checkpoint(directory.path(), tensors);
  write_checkpoint(elsewhere.path(), tensors);
  const std::string shard = directory.path() + "/" + shard_name(0, 1);
  FaultFs exchanging(real_fs(), [&](const std::string& kind, const std::string& path, int64_t) {
    if (kind == "open" && path == shard) {
      std::filesystem::remove(shard);
      std::filesystem::create_symlink(elsewhere.path() + "/" + shard_name(0, 1), shard);
    }
    return Fault{};
  });
  try {
    const Reader reader(exchanging, directory.path());
    FAIL() << "the link was followed";
  } catch (const IoError& error) {
    EXPECT_EQ(error.error_number(), ELOOP);
  }
}

TEST(ExchangeTest, AFolderThatIsExchangedAfterTheManifestWasReadIsNotMixedWithTheOther) {
  const TempDir top;
  const std::string path = top.path() + "/c", other = top.path() + "/other";
  std::filesystem::create_directory(path);
  std::filesystem::create_directory(other);
  write_checkpoint(path, {{"w", "F32", {4}, {Box::whole({4})}}});
  write_checkpoint(other, {{"w", "F32", {4}, {Box::whole({4})}}}, /*salt=*/1);
  const std::string before = Reader(real_fs(), path).tensor_digest("w");
  bool exchanged = false;
  FaultFs exchanging(real_fs(), [&](const std::string& kind, const std::string& opened, int64_t) {
    if (kind == "open" && opened.ends_with(".safetensors") && !exchanged) {
      exchanged = true;
      std::filesystem::rename(path, top.path() + "/moved");
      std::filesystem::create_directory_symlink(other, path);
    }
    return Fault{};
  });
  EXPECT_EQ(Reader(exchanging, path).tensor_digest("w"), before);
  EXPECT_TRUE(exchanged);
}

// Runs `work` in a child. @return its peak of resident memory; -1 when it died.
int64_t peak_bytes_of(const std::function<void()>& work) {
  malloc_trim(0);  // the child's count begins with what its parent holds
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    work();
    _exit(0);
  }
  int status = 0;
  rusage usage{};
  if (wait4(child, &status, 0, &usage) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0) return -1;
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

// Writes `unit(i)` again and again until `bytes` are full.
std::string filled(std::string text, size_t bytes, const std::function<std::string(size_t)>& unit) {
  text.reserve(bytes);
  for (size_t i = 0;; ++i) {
    const std::string next = unit(i);
    if (text.size() + next.size() > bytes) return text;
    text += next;
  }
}

struct Bomb {
  const char* name;
  std::string start;
  std::function<std::string(size_t)> unit;
  std::string end;
};

std::string hex_of(size_t i) { return hex8(static_cast<uint32_t>(i)); }

const std::string kManifestStart =
    R"({"format":"lockstep-checkpoint","version":1,"step":1,"epoch":1,"samples":0,"world_size":1,"parent_step":-1,)"
    R"("config":{},"record":{},"data":"",)";
const std::string kNoFiles = R"("files":[],)",
                  kOneFile = R"("files":[{"name":"s","bytes":9,"header_crc32c":"00000000"}],)";

std::vector<Bomb> manifest_bombs() {
  const std::string start = kManifestStart;
  return {
      {"tiny values", start + kNoFiles + R"("x":[0)", [](size_t) { return ",0"; }, R"(],"tensors":{}})"},
      {"empty lists", start + kNoFiles + R"("x":[[])", [](size_t) { return ",[]"; }, R"(],"tensors":{}})"},
      {"keys", start + kNoFiles + R"("tensors":{},"x":{"":0)", [](size_t i) { return ",\"" + hex_of(i) + "\":0"; },
       "}}"},
      {"a text", start + kNoFiles + R"("tensors":{},"x":")", [](size_t) { return std::string(1000, 'x'); }, "\"}"},
      {"an escaped text", start + kNoFiles + R"("tensors":{},")", [](size_t) { return "\\u0061"; }, "\":0}"},
      {"escaped keys", start + kNoFiles + R"("tensors":{},"x":{"":0)",
       [](size_t i) { return ",\"\\n" + hex_of(i) + "\":0"; }, "}}"},
      {"a configuration", R"({"config":{"x":[0)", [](size_t) { return ",0"; }, "]}}"},
      {"files", start + R"("tensors":{},"files":[{"name":"s","bytes":9,"header_crc32c":"00000000"})",
       [](size_t i) { return R"(,{"name":")" + hex_of(i) + R"(","bytes":9,"header_crc32c":"00000000"})"; }, "]}"},
      {"empty files", start + R"("tensors":{},"files":[{})", [](size_t) { return ",{}"; }, "]}"},
      {"tensors", start + kNoFiles + R"("tensors":{"w":{"dtype":"F32","shape":[0],"boxes":[]})",
       [](size_t i) { return ",\"" + hex_of(i) + R"(":{"dtype":"F32","shape":[0],"boxes":[]})"; }, "}}"},
      {"long names", start + kNoFiles + R"("tensors":{"w":{"dtype":"F32","shape":[0],"boxes":[]})",
       [](size_t i) {
         return ",\"" + hex_of(i) + std::string(1000, 'n') + R"(":{"dtype":"F32","shape":[0],"boxes":[]})";
       },
       "}}"},
      {"tensors of a box",
       start + kOneFile + R"("tensors":{"w":{"dtype":"F32","shape":[],"boxes":[{"offsets":[],"sizes":[],"file":0}]})",
       [](size_t i) {
         return ",\"" + hex_of(i) +
                R"(":{"dtype":"F32","shape":[1,1],"boxes":[{"offsets":[0,0],"sizes":[1,1],"file":0}]})";
       },
       "}}"},
      {"boxes",
       start + kOneFile +
           R"("tensors":{"w":{"dtype":"F32","shape":[1000000000],"boxes":[{"offsets":[0],"sizes":[1],"file":0})",
       [](size_t i) {
         return R"(,{"offsets":[)" + std::to_string(i + 1) + R"(],"sizes":[1],"file":)" + std::to_string(i + 1) + "}";
       },
       "]}}}"},
      {"empty boxes", start + kOneFile + R"("tensors":{"w":{"dtype":"F32","shape":[1],"boxes":[{})",
       [](size_t) { return ",{}"; }, "]}}}"},
      {"a shape", start + kOneFile + R"("tensors":{"w":{"dtype":"F32","shape":[1)", [](size_t) { return ",1"; },
       "]}}}"},
  };
}

// Looks at a checkpoint in a process of its own.
void expect_little_memory(const std::string& directory, const std::string& name) {
  const auto start = std::chrono::steady_clock::now();
  const int64_t peak = peak_bytes_of([&] { verify(real_fs(), directory, {}, 1); });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_GT(peak, 0) << name << ": it died";
  EXPECT_LE(peak, kMaxPeakBytes) << name;
  std::cout << name << ": peak " << (peak >> 20) << " MiB, " << seconds << " s\n";
}

TEST(HostileTest, ManifestsOf64MiBTakeNoMoreThan256MiBWhateverTheyHold) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer takes memory of its own";
  for (const Bomb& bomb : manifest_bombs()) {
    const TempDir directory;
    {
      std::string body = filled(bomb.start, kMaxManifestBytes - 100, bomb.unit) + bomb.end + "\n";
      std::ofstream(directory.path() + "/MANIFEST") << body << "crc32c " << hex8(crc32c(body)) << "\n";
    }
    expect_little_memory(directory.path(), bomb.name);
  }
}

std::vector<Bomb> header_bombs() {
  const auto crc_object = [](const std::string& inside) { return R"({"__metadata__":{"LOCKSTEP_CRC32C":"{)" + inside; };
  return {
      {"tensors", R"({"__metadata__":{"LOCKSTEP_CRC32C":"{}"},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})",
       [](size_t i) { return ",\"" + hex_of(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})"; }, "}"},
      {"tiny values", R"({"x":[0)", [](size_t) { return ",0"; }, "]}"},
      {"metadata", R"({"__metadata__":{"":"")", [](size_t i) { return ",\"" + hex_of(i) + "\":\"\""; }, "}}"},
      {"a text", R"({"__metadata__":{"x":")", [](size_t) { return std::string(1000, 'x'); }, "\"}}"},
      {"checksums of nothing", crc_object(R"(\"\":\"\")"), [](size_t i) { return R"(,\")" + hex_of(i) + R"(\":0)"; },
       "}\"}}"},
      {"a checksum", crc_object(R"(\"w\":\")"), [](size_t) { return std::string(1000, '0'); }, R"(\"}"}})"},
  };
}

TEST(HostileTest, HeadersOf100MBTakeNoMoreThan256MiBWhateverTheyHold) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer takes memory of its own";
  for (const Bomb& bomb : header_bombs()) {
    const TempDir directory;
    {
      std::string head = filled(std::string(8, '\0') + bomb.start, kMaxHeaderBytes - 100, bomb.unit) + bomb.end;
      const uint64_t length = head.size() - sizeof(length);
      std::memcpy(head.data(), &length, sizeof(length));
      std::ofstream(directory.path() + "/s") << head;
      Manifest manifest;
      manifest.files = {{"s", head.size(), crc32c(head)}};
      write_durable(real_fs(), directory.path() + "/MANIFEST", encode_manifest(manifest));
    }
    expect_little_memory(directory.path(), bomb.name);
  }
}

}  // namespace
}  // namespace lockstep::format
