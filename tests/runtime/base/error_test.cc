#include <cerrno>
#include <new>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;

template <typename Throw>
Failure describe(Throw body) {
  try {
    body();
  } catch (...) {
    return describe_current_exception();
  }
  return {ExitCode::kDone, "nothing was thrown"};
}

TEST(ErrorTest, EachKindLeadsToItsExitCode) {
  EXPECT_EQ(describe([] { throw ConfigError("c"); }).code, ExitCode::kConfig);
  EXPECT_EQ(describe([] { throw CorruptData("c"); }).code, ExitCode::kBadData);
  EXPECT_EQ(describe([] { throw IoError("reading", "/x", EIO); }).code, ExitCode::kStorage);
  EXPECT_EQ(describe([] { throw CollectiveError("c"); }).code, ExitCode::kRunAgain);
  EXPECT_EQ(describe([] { throw CollectiveError("c", ExitCode::kHang); }).code, ExitCode::kHang);
  EXPECT_EQ(describe([] { throw ShapeMismatch("c"); }).code, ExitCode::kBug);
  EXPECT_EQ(describe([] { throw Preempted("c"); }).code, ExitCode::kRunAgain);
  EXPECT_EQ(describe([] { throw Fenced("c"); }).code, ExitCode::kFenced);
  EXPECT_EQ(describe([] { throw std::runtime_error("c"); }).code, ExitCode::kBug);
  EXPECT_EQ(describe([] { throw 7; }).code, ExitCode::kBug);
  EXPECT_THAT(describe([] { throw std::bad_alloc(); }).message, HasSubstr("out of memory"));
}

TEST(ErrorTest, AnErrorOfLibTorchIsToldWithoutItsBacktrace) {
  const Failure failure = describe([] {
    throw std::runtime_error(
        "mat1 and mat2 shapes cannot be multiplied\nException raised from mm at x.cpp:1\nframe #0");
  });
  EXPECT_EQ(failure.message, "mat1 and mat2 shapes cannot be multiplied");
}

TEST(ErrorTest, AnIoErrorCarriesPathAndErrno) {
  const IoError error("writing", "/data/shard", ENOSPC);
  EXPECT_STREQ(error.what(), "writing '/data/shard': No space left on device (errno 28)");
  EXPECT_EQ(error.path(), "/data/shard");
  EXPECT_EQ(error.error_number(), ENOSPC);
}

TEST(CheckTest, ABrokenInvariantSaysItsConditionPlaceAndMessage) {
  const int bucket = 12;
  const Failure failure = describe([&] { LOCKSTEP_CHECK(bucket < 4) << "bucket " << bucket << " of 4"; });
  EXPECT_EQ(failure.code, ExitCode::kBug);
  EXPECT_THAT(failure.message,
              AllOf(HasSubstr("bucket < 4"), HasSubstr("error_test.cc:"), HasSubstr("bucket 12 of 4")));
}

TEST(CheckTest, AnInvariantThatHoldsCostsNoMessageAndIsOneStatement) {
  const bool holds = true;
  int formatted = 0;
  if (holds)
    LOCKSTEP_CHECK(holds) << ++formatted;
  else
    ADD_FAILURE() << "the else went to the macro's if";
  EXPECT_EQ(formatted, 0);
}

struct CountedTraits {
  using Handle = int;
  static int null() noexcept { return 0; }
  static void close(int handle) noexcept { closed().push_back(handle); }
  static std::vector<int>& closed() {
    static std::vector<int> handles;
    return handles;
  }
};

TEST(UniqueHandleTest, EveryHandleIsClosedOnce) {
  auto& closed = CountedTraits::closed();
  closed.clear();
  {
    UniqueHandle<CountedTraits> a(1), b(2), empty;
    a = std::move(b);  // closes 1
    EXPECT_EQ(closed, std::vector<int>{1});
    EXPECT_EQ(a.get(), 2);
    EXPECT_FALSE(b);  // NOLINT(bugprone-use-after-move): what a moved-from handle holds is the point
    UniqueHandle<CountedTraits> c(std::move(a));
    EXPECT_EQ(c.release(), 2);  // ours now
    c.reset(3);
  }
  EXPECT_EQ(closed, (std::vector<int>{1, 3}));
}

}  // namespace
}  // namespace lockstep
