#include "rank_sum.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <torch/types.h>

#include <lockstep/sharding/parameter_placement.h>
#include <lockstep/sharding/rank_order_sum.h>

namespace lockstep {
namespace {

// Above it pieces travel to owners and back (2(p-1)/p x bytes, two exchanges) instead of everything to everyone
// ((p-1) x bytes, one exchange; for two ranks the bytes are the same).
constexpr int64_t kGatherBytes = 64 << 10;

bool is_half(const at::Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf; }

at::Tensor sum_of_rows(const at::Tensor& rows) {
  const int64_t count = rows.size(0);
  if (!is_half(rows)) {
    at::Tensor sum = at::add(rows[0], rows[1]);
    for (int64_t i = 2; i < count; ++i) sum.add_(rows[i]);
    return sum;
  }
  at::Tensor sum = rows[0].to(at::kFloat);
  for (int64_t i = 1; i < count; ++i) sum.add_(rows[i]);
  return sum.to(rows.scalar_type());
}

}  // namespace

at::Tensor gather_ranks(ProcessGroup& group, const at::Tensor& tensor, Milliseconds timeout) {
  std::vector<int64_t> shape = tensor.sizes().vec();
  shape.insert(shape.begin(), group.size());
  at::Tensor all = at::empty(shape, tensor.options());
  group.all_gather(all, tensor.contiguous(), timeout).wait();
  return all;
}

at::Tensor sum_scattered(ProcessGroup& group, const at::Tensor& pieces, Milliseconds timeout) {
  const at::Tensor input = pieces.contiguous();
  at::Tensor received = at::empty_like(input);
  const std::vector<int64_t> counts(group.size(), input.numel() / group.size());
  group.all_to_all(received, input, counts, counts, timeout).wait();
  return sum_of_rows(received);
}

at::Tensor sum_over_ranks(ProcessGroup& group, const at::Tensor& tensor, Milliseconds timeout) {
  const int size = group.size();
  if (size == 1) return tensor.clone();
  if (size == 2 || static_cast<int64_t>(tensor.nbytes()) <= kGatherBytes)
    return sum_of_rows(gather_ranks(group, tensor, timeout));

  const at::Tensor input = tensor.contiguous();
  const std::vector<Part> parts = even_parts(input.numel(), size);
  std::vector<int64_t> counts;
  counts.reserve(parts.size());
  for (const Part& part : parts) counts.push_back(part.size);
  const int64_t mine = counts[group.rank()];
  at::Tensor received = at::empty({size, mine}, input.options());
  group.all_to_all(received, input, std::vector<int64_t>(size, mine), counts, timeout).wait();
  at::Tensor sum = at::empty(input.sizes(), input.options());
  group.all_gather_uneven(sum, sum_of_rows(received), counts, timeout).wait();
  return sum;
}

void sum_in_rank_order(ProcessGroup& group, const std::vector<int>& ranks, const std::vector<at::Tensor>& tensors,
                       Milliseconds timeout) {
  if (tensors.empty() || group.size() == 1) return;
  std::vector<at::Tensor> flat;
  flat.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) flat.push_back(tensor.view({-1}));
  const at::Tensor all = gather_ranks(group, at::cat(flat), timeout);
  at::Tensor sum = all[ranks[0]];
  for (size_t i = 1; i < ranks.size(); ++i) sum.add_(all[ranks[i]]);
  int64_t offset = 0;
  for (const at::Tensor& tensor : flat) {
    tensor.copy_(sum.narrow(0, offset, tensor.numel()));
    offset += tensor.numel();
  }
}

}  // namespace lockstep
