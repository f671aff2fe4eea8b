// The same Store on real processes.
#include <array>
#include <cstring>
#include <filesystem>

#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/collectives/mpi_group.h>

#include "state.h"

namespace lockstep::checkpoint {
namespace {

// One folder for all ranks: rank 0's name for it.
std::string shared_directory(ProcessGroup& world) {
  std::array<char, 256> name{};
  if (world.rank() == 0) {
    std::snprintf(name.data(), name.size(), "%s/lockstep_checkpoint_mpi_XXXXXX", testing::TempDir().c_str());
    if (mkdtemp(name.data()) == nullptr) name[0] = '\0';
  }
  return all_gather_bytes(world, std::as_bytes(std::span(name))).c_str();  // up to rank 0's first zero
}

TEST(StoreMpiTest, ProcessesSaveTogetherLoadTogetherAndFallBackTogether) {
  const auto world = make_mpi_world();
  const std::string run_dir = shared_directory(*world);
  const uint64_t epoch = acquire_epoch(real_fs(), *world, run_dir, /*take_over=*/false);
  EXPECT_EQ(epoch, 1U);
  Store store(real_fs(), *world, {.run_dir = run_dir, .epoch = epoch});
  for (int step : {1, 2})
    EXPECT_TRUE(store.save(progress_at(step), make_state(Cut::kRows, world->size(), world->rank(), step)));
  const auto state = make_state(Cut::kColumns, world->size(), world->rank(), 0, /*filled=*/false);
  EXPECT_EQ(store.load_newest(state)->step, 2);
  EXPECT_EQ(first_difference(state, world->rank(), 2), "");
  world->barrier();
  if (world->rank() == 0) std::filesystem::resize_file(run_dir + "/checkpoints/step-00000002.e0001/MANIFEST", 100);
  world->barrier();
  EXPECT_EQ(store.load_newest(state)->step, 1);
  EXPECT_EQ(first_difference(state, world->rank(), 1), "");
  EXPECT_EQ(acquire_epoch(real_fs(), *world, run_dir, /*take_over=*/false), 2U);
  EXPECT_THROW(store.save(progress_at(3), state), Fenced);
  world->barrier();
  if (world->rank() == 0) std::filesystem::remove_all(run_dir);
  world->close();
}

}  // namespace
}  // namespace lockstep::checkpoint
