#pragma once

#include <map>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace lockstep::fuzz {

/// What a run leaves that a layout must not change.
struct Outcome {
  struct Step {
    double loss = 0, grad_norm = 0;
  };
  std::vector<Step> steps;
  double validation_loss = 0;                 ///< nan without validation data
  std::map<std::string, at::Tensor> tensors;  ///< of the last checkpoint, by key
};

/// Reads metrics.jsonl and the newest checkpoint of a run.
Outcome read_outcome(const std::string& run_dir);

/// Empty when both are the same to the bit; else the first difference and how many there are.
std::string difference(const Outcome& actual, const Outcome& expected);

/// Empty when each tensor's max|a-b| is at most `bound` times its max|b|, and figures differ by no more than that.
/// What is zero in exact arithmetic holds nothing but rounding errors, so no tensor is held to less than a thousandth
/// of the largest of its kind.
std::string beyond(const Outcome& actual, const Outcome& expected, double bound);

}  // namespace lockstep::fuzz
