#include "../../launcher/src/machine_checks.h"

#include <fstream>

#include <gtest/gtest.h>

#include "../runtime/base/temp_dir.h"

namespace lockstep::launcher {
namespace {

class CgroupTest : public testing::Test {
 protected:
  void write(const char* name, const char* text) { std::ofstream(folder_ / name) << text; }
  std::optional<uint64_t> free() { return memory_free_of_cgroup(folder_.path()); }

  TempDir folder_;
};

TEST_F(CgroupTest, FilesInTheCacheAreNotInUse) {
  write("memory.max", "1000\n");
  write("memory.current", "990\n");
  write("memory.stat", "anon 300\nfile 690\ninactive_anon 10\ninactive_file 500\nactive_file 150\nunevictable 0\n");
  EXPECT_EQ(free(), 660);
}

TEST_F(CgroupTest, MoreThanTheLimitLeavesNothing) {
  write("memory.max", "1000\n");
  write("memory.current", "1200\n");
  EXPECT_EQ(free(), 0);
}

TEST_F(CgroupTest, NoLimit) {
  EXPECT_EQ(free(), std::nullopt);
  write("memory.max", "max\n");
  write("memory.current", "990\n");
  EXPECT_EQ(free(), std::nullopt);
}

}  // namespace
}  // namespace lockstep::launcher
