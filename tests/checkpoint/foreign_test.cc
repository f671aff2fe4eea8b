// Checkpoints that belong to somebody else, and those in which something else lies in a file's place.
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>

#include <sys/stat.h>
#include <unistd.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/collectives/local_group.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>

#include "../support/log_catcher.h"
#include "state.h"
#include "temp_dir.h"

namespace lockstep::checkpoint {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int kWorldSize = 2;

std::string saved(const std::string& run_dir, int64_t step) {
  run_local_ranks(kWorldSize, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir, .epoch = 7});
    EXPECT_TRUE(
        store.save(progress_at(step), make_state(Cut::kRows, kWorldSize, group.rank(), static_cast<int>(step))));
  });
  return run_dir + "/checkpoints/" + format::directory_name(step, 7);
}

// Loads on all ranks; what rank 0 got or threw.
struct Loaded {
  int64_t step = -1;
  std::string error;
  ExitCode code = ExitCode::kDone;
};
Loaded load(const std::string& run_dir, bool trust_foreign, const std::string& path = "") {
  Loaded loaded;
  std::atomic<int> agreed{0};
  run_local_ranks(kWorldSize, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir, .epoch = 8, .trust_foreign = trust_foreign});
    const auto state = make_state(Cut::kRows, kWorldSize, group.rank(), 0, /*filled=*/false);
    Loaded mine;
    try {
      mine.step = path.empty() ? store.load_newest(state)->step : store.load(path, state).step;
    } catch (const Error& error) {
      mine.error = error.what();
      mine.code = error.exit_code();
    }
    agreed += mine.code == ExitCode::kDone ? 1 : -1;
    if (group.rank() == 0) loaded = mine;
  });
  EXPECT_EQ(std::abs(agreed), kWorldSize) << "ranks came to two verdicts";
  return loaded;
}

TEST(ForeignCheckpointTest, EndsTheLoadUntilAPersonTrustsItAndThenSaysWhoseItIs) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root gives files away";
  const TempDir run;
  saved(run.path(), 10);
  const std::string newest = saved(run.path(), 20);
  EXPECT_EQ(load(run.path(), /*trust_foreign=*/false).step, 20);
  ASSERT_EQ(::chown((newest + "/" + format::shard_name(1, kWorldSize)).c_str(), 65534, 65534), 0);
  for (const std::string& path : {std::string(), newest}) {
    const Loaded refused = load(run.path(), /*trust_foreign=*/false, path);
    EXPECT_EQ(refused.code, ExitCode::kConfig) << "a person decides, not a fall-back";
    EXPECT_THAT(refused.error, AllOf(HasSubstr("uid 65534"), HasSubstr("--trust_foreign_checkpoint")));
    EXPECT_FALSE(std::filesystem::exists(newest + "/" + format::kQuarantineName)) << "it is not damaged";
    const test::LogCatcher warnings(google::GLOG_WARNING);
    EXPECT_EQ(load(run.path(), /*trust_foreign=*/true, path).step, 20);
    const std::string digest = format::Reader(real_fs(), newest, format::Trust::kAny).manifest_sha256();
    EXPECT_THAT(warnings.text(), AllOf(HasSubstr("(uid 65534)"), HasSubstr("epoch 7"), HasSubstr(digest)));
  }
}

TEST(ForeignCheckpointTest, LinksFifosAndFoldersInAFilesPlaceAreDamageAndTheOneBeforeIsLoaded) {
  const std::pair<const char*, std::function<bool(const std::string&)>> replacements[] = {
      {"a link to the very file",
       [](const std::string& path) {
         std::filesystem::rename(path, path + ".real");
         return ::symlink((path + ".real").c_str(), path.c_str()) == 0;
       }},
      {"a FIFO",
       [](const std::string& path) {
         std::filesystem::remove(path);
         return ::mkfifo(path.c_str(), 0600) == 0;
       }},
      {"a folder",
       [](const std::string& path) {
         std::filesystem::remove(path);
         return std::filesystem::create_directory(path);
       }},
  };
  for (const auto& [what, replace] : replacements) {
    for (const std::string& file : {format::shard_name(0, kWorldSize), std::string(format::kManifestName)}) {
      const TempDir run;
      saved(run.path(), 10);
      const std::string path = saved(run.path(), 20).append("/").append(file);
      ASSERT_TRUE(replace(path)) << what;
      alarm(20);  // a FIFO would wait for its writer
      EXPECT_EQ(load(run.path(), /*trust_foreign=*/false).step, 10) << what << " for " << file;
      alarm(0);
    }
  }
}

}  // namespace
}  // namespace lockstep::checkpoint
