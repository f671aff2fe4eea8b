#pragma once

#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>

#include <lockstep/base/fs.h>
#include <lockstep/collectives/process_group.h>

namespace lockstep::checkpoint {

/// The highest epoch of a run: whoever holds a lower one has been superseded.
uint64_t newest_epoch(Fs& fs, const std::string& run_dir);

/// Rank 0's number, as a [1] i64 tensor, on every rank.
at::Tensor broadcast_number(ProcessGroup& world, int64_t value);

/// Rank 0's text on every rank.
std::string broadcast_text(ProcessGroup& world, const std::string& text);

/// True when every rank says true.
bool all_agree(ProcessGroup& world, bool mine);

}  // namespace lockstep::checkpoint
