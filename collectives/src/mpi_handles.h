#pragma once

#include <source_location>
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
inline void check_mpi(int code, const std::string& doing,
                      std::source_location where = std::source_location::current()) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw CollectiveError(doing + " failed: " + std::string(text, length) + " (" + where.file_name() + ":" +
                        std::to_string(where.line()) + ")");
}

}  // namespace lockstep
