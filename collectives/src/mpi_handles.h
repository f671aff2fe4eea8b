#pragma once

#include <string>

#include <mpi.h>

#include <lockstep/base/error.h>
#include <lockstep/base/unique_handle.h>

namespace lockstep {

struct MpiCommTraits {
  using Handle = MPI_Comm;
  static Handle null() noexcept { return MPI_COMM_NULL; }
  static void close(Handle comm) noexcept {
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (!finalized) MPI_Comm_free(&comm);
  }
};
using UniqueMpiComm = UniqueHandle<MpiCommTraits>;

/// @throws CollectiveError with MPI's own words, unless `code` is MPI_SUCCESS.
/// The place by built-ins: clang-tidy 14 does not know std::source_location.
inline void check_mpi(int code, const std::string& doing, const char* file = __builtin_FILE(),
                      int line = __builtin_LINE()) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw CollectiveError(doing + " failed: " + std::string(text, length) + " (" + file + ":" + std::to_string(line) +
                        ")");
}

}  // namespace lockstep
