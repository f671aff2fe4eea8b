// Which device and back end a run gets, and what it is told when it cannot have the one it asked for.
#include "placement.h"

#include <dlfcn.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;

const CudaPlugin kSomePlugin{};
const CudaState kGpu{&kSomePlugin, true, ""};
const CudaState kNoGpu{nullptr, false, "there is no CUDA driver. Mend: go where there is one"};

RankInfo ranks(int world_size, bool has_mpi) {
  RankInfo info;
  info.world_size = world_size;
  info.has_mpi = has_mpi;
  info.launcher = has_mpi ? "mpirun" : world_size > 1 ? "torchrun" : "none";
  return info;
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "nothing was refused";
}

TEST(PlacementTest, FollowsTheOptionsAndWhatIsThere) {
  const struct {
    const char *device, *backend;
    int world_size;
    bool has_mpi, has_gpu, is_on_gpu, is_over_nccl;
  } cases[] = {
      {"auto", "auto", 4, true, true, true, true},     {"auto", "auto", 4, true, false, false, false},
      {"auto", "mpi", 4, true, true, false, false},    {"auto", "nccl", 4, true, true, true, true},
      {"cuda", "auto", 4, true, true, true, true},     {"cuda", "nccl", 4, false, true, true, true},
      {"cpu", "auto", 4, true, true, false, false},    {"cpu", "mpi", 4, true, true, false, false},
      {"auto", "auto", 4, false, true, true, true},    {"auto", "auto", 1, false, true, true, false},
      {"auto", "auto", 1, false, false, false, false}, {"cuda", "nccl", 1, false, true, true, true},
  };
  for (const auto& one : cases) {
    const RuntimeOptions options{.device = one.device, .backend = one.backend};
    const Placement placement =
        choose_placement(options, ranks(one.world_size, one.has_mpi), one.has_gpu ? kGpu : kNoGpu);
    const std::string which = std::string("--device=") + one.device + " --backend=" + one.backend + " on " +
                              std::to_string(one.world_size) + (one.has_gpu ? " with" : " without") + " GPU";
    EXPECT_EQ(placement.is_on_gpu, one.is_on_gpu) << which;
    EXPECT_EQ(placement.is_over_nccl, one.is_over_nccl) << which;
  }
}

TEST(PlacementTest, AsksForAGpuOnlyWhereOneCouldBeUsed) {
  EXPECT_TRUE(may_use_gpu({.device = "auto", .backend = "auto"}));
  EXPECT_TRUE(may_use_gpu({.device = "auto", .backend = "nccl"}));
  EXPECT_TRUE(may_use_gpu({.device = "cuda", .backend = "auto"}));
  EXPECT_FALSE(may_use_gpu({.device = "cpu", .backend = "auto"}));
  EXPECT_FALSE(may_use_gpu({.device = "auto", .backend = "mpi"}));
  EXPECT_FALSE(may_use_gpu({.device = "auto", .backend = "shm"}));
}

TEST(PlacementTest, RefusesWhatIsUnknownOrContradictsItself) {
  const auto refused = [](const char* device, const char* backend) {
    return refusal([&] { may_use_gpu({.device = device, .backend = backend}); });
  };
  EXPECT_THAT(refused("gpu", "auto"), HasSubstr("--device=gpu is neither auto, cpu nor cuda"));
  EXPECT_THAT(refused("auto", "gloo"), HasSubstr("--backend=gloo is neither auto, shm, mpi nor nccl"));
  EXPECT_THAT(refused("cpu", "nccl"), AllOf(HasSubstr("--device=cpu"), HasSubstr("Mend: ")));
  EXPECT_THAT(refused("cuda", "shm"), AllOf(HasSubstr("--backend=shm"), HasSubstr("Mend: ")));
  EXPECT_THAT(refused("cuda", "mpi"), AllOf(HasSubstr("--backend=mpi"), HasSubstr("Mend: ")));
}

TEST(PlacementTest, RanksOfOneNodeShareMemoryAndSeveralNodesWithSeveralRanksDoBoth) {
  const struct {
    const char* backend;
    std::vector<int> nodes;
    CpuBackend wanted;
  } cases[] = {{"auto", {0, 0, 0}, CpuBackend::kShm},      {"auto", {0}, CpuBackend::kMpi},
               {"auto", {0, 1, 2}, CpuBackend::kMpi},      {"auto", {0, 0, 2}, CpuBackend::kTwoLevel},
               {"auto", {0, 1, 0}, CpuBackend::kTwoLevel}, {"mpi", {0, 0, 0}, CpuBackend::kMpi},
               {"shm", {0, 0, 0}, CpuBackend::kShm},       {"shm", {0}, CpuBackend::kShm}};
  for (const auto& one : cases)
    EXPECT_EQ(choose_cpu_backend({.backend = one.backend}, one.nodes), one.wanted) << one.backend << one.nodes.size();
  EXPECT_THAT(refusal([] {
                choose_cpu_backend({.backend = "shm"}, std::vector<int>{0, 1, 0});
              }),
              AllOf(HasSubstr("3 ranks live on 2 nodes"), HasSubstr("Mend: ")));
}

TEST(PlacementTest, RefusesAGpuThatIsNotThereWithTheReasonAndTheMend) {
  EXPECT_THAT(refusal([] { choose_placement({.device = "cuda"}, ranks(1, false), kNoGpu); }),
              AllOf(HasSubstr("--device=cuda cannot be: there is no CUDA driver"), HasSubstr("Mend: go where")));
  EXPECT_THAT(refusal([] { choose_placement({.backend = "nccl"}, ranks(4, true), kNoGpu); }),
              AllOf(HasSubstr("--backend=nccl cannot be: there is no CUDA driver"), HasSubstr("Mend: go where")));
}

TEST(PlacementTest, RefusesManyRanksThatHaveNeitherMpiNorAGpu) {
  EXPECT_THAT(refusal([] { choose_placement({}, ranks(4, false), kNoGpu); }),
              AllOf(HasSubstr("started by torchrun with 4 ranks"), HasSubstr("Mend: lockstep run -n 4")));
}

// From here on this process has that driver, on a machine with a real one too.
void load_driver(int init_result, int devices) {
  void* driver = dlopen(FAKE_DRIVER, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(driver, nullptr) << dlerror();
  const auto answer = reinterpret_cast<void (*)(int, int)>(dlsym(driver, "fake_driver_answers"));
  ASSERT_NE(answer, nullptr);
  answer(init_result, devices);
}

class CudaLoaderTest : public testing::Test {
 protected:
  void SetUp() override { load_driver(0, 2); }
};

TEST_F(CudaLoaderTest, ADriverWithoutGpusIsNone) {
  load_driver(0, 0);
  CudaState state = load_cuda_plugin(FAKE_PLUGIN_FOLDER "/good");
  EXPECT_FALSE(state.has_driver);
  EXPECT_EQ(state.plugin, nullptr);
  EXPECT_THAT(state.why, AllOf(HasSubstr("sees no GPU"), HasSubstr("Mend: ")));
  load_driver(100, 2);
  state = load_cuda_plugin(FAKE_PLUGIN_FOLDER "/good");
  EXPECT_FALSE(state.has_driver);
  EXPECT_THAT(state.why, HasSubstr("cuInit says 100"));
}

TEST_F(CudaLoaderTest, ThePlugInIsLoadedWhenItsVersionIsOurs) {
  const CudaState state = load_cuda_plugin(FAKE_PLUGIN_FOLDER "/good");
  EXPECT_TRUE(state.has_driver);
  ASSERT_NE(state.plugin, nullptr) << state.why;
  EXPECT_EQ(state.plugin->device_count(), 4);
}

TEST_F(CudaLoaderTest, APlugInOfAnotherBuildIsRefused) {
  const CudaState state = load_cuda_plugin(FAKE_PLUGIN_FOLDER "/other");
  EXPECT_TRUE(state.has_driver);
  EXPECT_EQ(state.plugin, nullptr);
  EXPECT_THAT(state.why, HasSubstr("was built for another lockstep"));
}

TEST_F(CudaLoaderTest, AMissingPlugInIsNamedWithTheLoadersWords) {
  const CudaState state = load_cuda_plugin(FAKE_PLUGIN_FOLDER "/nowhere");
  EXPECT_TRUE(state.has_driver);
  EXPECT_EQ(state.plugin, nullptr);
  EXPECT_THAT(state.why, AllOf(HasSubstr("nowhere/liblockstep_cuda.so: cannot open"), HasSubstr("Mend: ")));
}

// The whole way, in a process of its own: run_rank ends it.
int run_without_gpu(const RuntimeOptions& options, const std::function<int(Runtime&)>& body) {
  load_driver(0, 0);
  return run_rank(options, body);
}

TEST(RunRankTest, AGpuThatIsNotThereEndsTheRankWithTheConfigurationsCode) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto body = [](Runtime&) { return 0; };
  EXPECT_EXIT(run_without_gpu({.device = "cuda"}, body), testing::ExitedWithCode(78),
              "--device=cuda cannot be: the CUDA");
  EXPECT_EXIT(run_without_gpu({.backend = "nccl"}, body), testing::ExitedWithCode(78), "--backend=nccl cannot be: ");
  EXPECT_EXIT(run_without_gpu({.device = "tpu"}, body), testing::ExitedWithCode(78), "neither auto, cpu nor cuda");
}

TEST(RunRankTest, AutoWithoutAGpuIsACpuRun) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto body = [](Runtime& runtime) {
    return runtime.device().is_cpu() && std::string(runtime.world().backend()) == "local" ? 3 : 4;
  };
  EXPECT_EXIT(std::_Exit(run_without_gpu({}, body)), testing::ExitedWithCode(3), "");
}

}  // namespace
}  // namespace lockstep
