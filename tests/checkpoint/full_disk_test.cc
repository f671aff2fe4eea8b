// A file system that has room for a part of a checkpoint only.
#include <cerrno>
#include <cstring>
#include <filesystem>

#include <sys/mount.h>
#include <unistd.h>

#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <lockstep/base/log.h>
#include <lockstep/collectives/local_group.h>

#include "../support/loop_disk.h"
#include "state.h"
#include "temp_dir.h"

namespace lockstep::checkpoint {
namespace {

constexpr int kRanks = 2;
constexpr int64_t kRows = 512, kColumns = 512;  // a MiB over all ranks

// A tmpfs, gone with the object.
class SmallDisk {
 public:
  explicit SmallDisk(const std::string& directory) : directory_(directory) {
    is_mounted_ = test::hide_mounts() && ::mount("tmpfs", directory.c_str(), "tmpfs", 0, "size=16m") == 0;
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  ~SmallDisk() {
    if (is_mounted_) ::umount2(directory_.c_str(), MNT_DETACH);
  }
  bool is_mounted() const { return is_mounted_; }
  int64_t used() const {
    const auto space = std::filesystem::space(directory_);
    return static_cast<int64_t>(space.capacity - space.free);
  }
  void resize(int64_t bytes) {
    const std::string how = "size=" + std::to_string(bytes);
    ASSERT_EQ(::mount("tmpfs", directory_.c_str(), "tmpfs", MS_REMOUNT, how.c_str()), 0) << strerror(errno);
  }

 private:
  std::string directory_;
  bool is_mounted_ = false;
};

std::vector<StateTensor> state_of(int rank, int64_t step) {
  return {{"weights", ShardLayout::sharded("layer.weight", {kRows, kColumns}, "F32", 0, kRanks),
           at::full({kRows / kRanks, kColumns}, static_cast<float>(10 * step + rank))}};
}

bool save(const std::string& run_dir, int64_t step) {
  bool durable = false;
  run_local_ranks(kRanks, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir});
    const bool saved = store.save(progress_at(step), state_of(group.rank(), step));
    if (group.rank() == 0) durable = saved;
  });
  return durable;
}

int64_t loaded(const std::string& run_dir) {
  int64_t step = 0;
  run_local_ranks(kRanks, [&](ProcessGroup& group) {
    Store store(real_fs(), group, {.run_dir = run_dir, .epoch = 2});
    auto state = state_of(group.rank(), 0);
    const auto progress = store.load_newest(state);
    ASSERT_TRUE(progress);
    EXPECT_TRUE(state[0].local.equal(state_of(group.rank(), progress->step)[0].local));
    if (group.rank() == 0) step = progress->step;
  });
  return step;
}

TEST(FullDiskTest, ASaveThatFindsNoRoomCostsNothingButItself) {
  const TempDir dir;
  SmallDisk disk(dir.path());
  if (!disk.is_mounted()) GTEST_SKIP() << "mounting a tmpfs: " << strerror(errno);
  google::SetStderrLogging(google::FATAL);
  const std::string run_dir = dir.path() + "/run";
  const int64_t empty = disk.used();
  ASSERT_TRUE(save(run_dir, 1));
  const int64_t whole = disk.used() - empty;
  int64_t last = 1;
  for (int percent = 10; percent <= 90; percent += 10) {
    const int64_t used = disk.used();
    disk.resize(used + whole * percent / 100);
    EXPECT_FALSE(save(run_dir, last + 1)) << percent << " % of the room it takes";
    EXPECT_EQ(disk.used(), used) << "something is left of the attempt, " << percent << " %";
    EXPECT_EQ(loaded(run_dir), last) << percent << " %";
    disk.resize(int64_t{16} << 20);
    EXPECT_TRUE(save(run_dir, ++last)) << "with room again, " << percent << " %";
    EXPECT_EQ(loaded(run_dir), last);
  }
  google::SetStderrLogging(google::ERROR);
}

}  // namespace
}  // namespace lockstep::checkpoint
