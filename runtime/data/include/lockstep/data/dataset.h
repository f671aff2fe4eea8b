#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace lockstep::data {

/// What a micro-batch is: tensors whose meaning the task knows (tokens and targets; pixels and labels), dim 0 =
/// samples.
struct Batch {
  std::vector<at::Tensor> tensors;
  /// Samples that count. Fewer than dim 0 when the last micro-batch of a finite pass is padded; the task's loss must
  /// mask the rest.
  int64_t valid_samples = 0;

  /// The tensors without padding: views of the samples that count.
  std::vector<at::Tensor> valid_tensors() const {
    std::vector<at::Tensor> valid;
    for (const at::Tensor& tensor : tensors) valid.push_back(tensor.narrow(0, 0, valid_samples));
    return valid;
  }
};

/// Samples by index. Stateless: the order comes from GlobalOrder, so the state of a loader is one number.
/// Threads: get() is called from prefetch threads, several at once.
class Dataset {
 public:
  virtual ~Dataset() = default;
  virtual int64_t size() const = 0;  ///< samples
  /// The samples at `indices`, stacked. @throws CorruptData naming file and position, e.g. a token id outside the
  /// vocabulary.
  virtual Batch get(std::span<const int64_t> indices) const = 0;
  /// A digest of what the data is (files, sizes, options), for the run record: resume on other data is refused.
  virtual std::string fingerprint() const = 0;
};

}  // namespace lockstep::data
