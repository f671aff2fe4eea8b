#include <cstring>

#include <lockstep/base/error.h>

namespace lockstep {

IoError::IoError(const std::string& doing, const std::string& path, int error_number)
    : Error(ExitCode::kStorage, doing + " '" + path + "': " + std::strerror(error_number) + " (errno " +
                                    std::to_string(error_number) + ")"),
      path_(path),
      error_number_(error_number) {}

namespace internal {

CheckThrower::CheckThrower(const char* condition, const char* file, int line) {
  stream_ << "check failed: " << condition << " (" << file << ":" << line << "): ";
}

// NOLINTNEXTLINE(bugprone-exception-escape): to throw is what it is for
CheckThrower::~CheckThrower() noexcept(false) { throw CheckFailed(stream_.str()); }

}  // namespace internal

Failure describe_current_exception() {
  try {
    throw;
  } catch (const Error& error) {
    return {error.exit_code(), error.what()};
  } catch (const std::bad_alloc&) {
    return {ExitCode::kBug, "out of memory. Mend: smaller --micro_batch_size, or fewer ranks a node"};
  } catch (const std::exception& error) {
    const std::string message = error.what();
    // c10::Error appends a backtrace of LibTorch's own frames after this line; a person needs what stands before it.
    return {ExitCode::kBug, message.substr(0, message.find("\nException raised from"))};
  } catch (...) {
    return {ExitCode::kBug, "an exception of unknown type"};
  }
}

}  // namespace lockstep
