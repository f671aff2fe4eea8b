#pragma once

#include <cstdint>
#include <memory>

#include <lockstep/collectives/process_group.h>

namespace lockstep {

struct MpiOptions {
  /// Elements a single MPI call moves at most; counts are C ints. Tests lower it to walk the code for tensors past
  /// 2^31.
  int64_t call_limit_elements = int64_t{1} << 30;
  /// Before each collective, compares operation (with its root or op), dtype and size over the ranks: a mismatch names
  /// two ranks instead of hanging.
  bool check_collectives = false;
};

/// The ranks of MPI_COMM_WORLD, which must be initialised with MPI_THREAD_MULTIPLE. Collective.
std::unique_ptr<ProcessGroup> make_mpi_world(MpiOptions options = {});

}  // namespace lockstep
