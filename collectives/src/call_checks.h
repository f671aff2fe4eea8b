#pragma once

#include <numeric>
#include <span>
#include <string>

#include <lockstep/base/error.h>
#include <lockstep/collectives/process_group.h>

namespace lockstep {

// As messages say it: all_reduce (sum).
inline std::string name_of(ReduceOp op) {
  return op == ReduceOp::kSum ? " (sum)" : op == ReduceOp::kMax ? " (max)" : " (min)";
}

// What every back end refuses before anything is sent: sizes that do not add up, and two dtypes, whose bytes would.

inline void check_dtypes(const char* operation, const ProcessGroup& group, const at::Tensor& output,
                         const at::Tensor& input) {
  LOCKSTEP_CHECK(output.scalar_type() == input.scalar_type())
      << operation << " in group " << group.name() << " of " << input.scalar_type() << " into " << output.scalar_type();
}

inline void check_reduce_scatter(const ProcessGroup& group, const at::Tensor& output, const at::Tensor& input) {
  LOCKSTEP_CHECK(input.numel() == output.numel() * group.size())
      << "reduce_scatter in group " << group.name() << " of " << input.numel() << " elements into " << output.numel()
      << " on " << group.size() << " ranks";
  check_dtypes("reduce_scatter", group, output, input);
}

inline void check_all_gather(const ProcessGroup& group, const at::Tensor& output, const at::Tensor& input,
                             std::span<const int64_t> counts) {
  LOCKSTEP_CHECK(static_cast<int>(counts.size()) == group.size() && input.numel() == counts[group.rank()] &&
                 output.numel() == std::accumulate(counts.begin(), counts.end(), int64_t{0}))
      << "all_gather in group " << group.name() << " of " << input.numel() << " elements into " << output.numel();
  check_dtypes("all_gather", group, output, input);
}

inline void check_all_to_all(const ProcessGroup& group, const at::Tensor& output, const at::Tensor& input,
                             std::span<const int64_t> receive_counts, std::span<const int64_t> send_counts) {
  LOCKSTEP_CHECK(static_cast<int>(receive_counts.size()) == group.size() &&
                 static_cast<int>(send_counts.size()) == group.size() &&
                 output.numel() == std::accumulate(receive_counts.begin(), receive_counts.end(), int64_t{0}) &&
                 input.numel() == std::accumulate(send_counts.begin(), send_counts.end(), int64_t{0}) &&
                 receive_counts[group.rank()] == send_counts[group.rank()])
      << "all_to_all in group " << group.name() << ": counts do not add up to the tensors' sizes";
  check_dtypes("all_to_all", group, output, input);
}

}  // namespace lockstep
