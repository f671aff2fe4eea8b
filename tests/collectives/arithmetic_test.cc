#include <bit>
#include <cstdlib>
#include <limits>
#include <thread>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/collectives/arithmetic.h>

namespace lockstep {
namespace {

using testing::HasSubstr;
using testing::Not;

// Bits, because a thread that flushes also takes a denormal number for zero where it compares.
uint32_t twice_the_least_number() {
  const at::Tensor least = at::full({100}, std::numeric_limits<float>::denorm_min(), at::kFloat);
  return std::bit_cast<uint32_t>(least.add(least).const_data_ptr<float>()[99]);
}

TEST(ArithmeticTest, EveryConfiguredThreadHasItsNumberOfThreadsAndKeepsDenormals) {
  std::thread([] {
    EXPECT_TRUE(at::globalContext().setFlushDenormal(true));
    EXPECT_EQ(twice_the_least_number(), 0U) << "else what follows proves nothing";
    configure_arithmetic(2);
    EXPECT_EQ(at::get_num_threads(), 2);
    EXPECT_EQ(twice_the_least_number(), 2U);
    std::thread([] {
      configure_arithmetic(1);
      EXPECT_EQ(at::get_num_threads(), 1);
    }).join();
    EXPECT_EQ(at::get_num_threads(), 2) << "another thread's number is its own";
  }).join();
}

TEST(ArithmeticTest, KernelsAreDeterministicAndFreshMemoryIsNotFilled) {
  at::globalContext().setDeterministicAlgorithms(false, false);
  at::globalContext().setDeterministicFillUninitializedMemory(true);
  configure_arithmetic(1);
  EXPECT_TRUE(at::globalContext().deterministicAlgorithms());
  EXPECT_TRUE(at::globalContext().deterministicAlgorithmsWarnOnly());
  EXPECT_FALSE(at::globalContext().deterministicFillUninitializedMemory());
}

TEST(ArithmeticTest, TheRecordTellsWhatDecidesBits) {
  ::unsetenv("MKL_CBWR");
  const std::string before = arithmetic_record(1);
  EXPECT_THAT(before, testing::AllOf(HasSubstr("torch 2.11"), HasSubstr(at::get_cpu_capability()),
                                     HasSubstr("threads 1"), Not(HasSubstr("MKL_CBWR"))));
  EXPECT_EQ(before, arithmetic_record(1));
  EXPECT_NE(before, arithmetic_record(2));
  for (const char* name :
       {"ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}) {
    ::setenv(name, "avx2", 1);
    EXPECT_THAT(arithmetic_record(1), HasSubstr(std::string(name) + "=avx2"));
    ::unsetenv(name);
  }
}

TEST(ArithmeticTest, RanksThatComputeOtherwiseAreNamedWithBothValues) {
  const std::string plain = arithmetic_facts(1);
  EXPECT_EQ(arithmetic_differences({"a", "b", "a"}, {plain, plain, plain}), "");
  ::setenv("MKL_CBWR", "AVX2", 1);
  const std::string other = arithmetic_facts(2);
  ::unsetenv("MKL_CBWR");
  const std::string text = arithmetic_differences({"a", "b", "c", "d"}, {plain, plain, other, other});
  EXPECT_THAT(text, testing::AllOf(HasSubstr("rank 0 (host a)"), HasSubstr("rank 2 (host c) and 1 more"),
                                   HasSubstr("rank 3 (host d)"), HasSubstr("MKL_CBWR: AVX2 against not set"),
                                   HasSubstr("threads: 2 against 1"), Not(HasSubstr("torch")), Not(HasSubstr("cpu"))));
}

}  // namespace
}  // namespace lockstep
