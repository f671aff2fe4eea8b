#include "add.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include <ATen/ops/add.h>
#include <ATen/ops/stack.h>

namespace lockstep {
namespace {

void add_floats(float* out, const float* a, const float* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] + b[i];
}

at::Tensor run_of(const at::Tensor& x, int64_t begin, int64_t numel) { return x.view({-1}).narrow(0, begin, numel); }

const float* floats(const at::Tensor& x, int64_t begin) { return x.const_data_ptr<float>() + begin; }
float* mutable_floats(const at::Tensor& x, int64_t begin) { return x.mutable_data_ptr<float>() + begin; }

// The pieces of one tensor whose cuts, of less than 2^39 quanta each, sum exactly in 63 bits.
constexpr int64_t kExactElements = int64_t{1} << 23;

std::vector<at::Tensor> exact_pieces(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> pieces;
  for (const at::Tensor& tensor : tensors) {
    for (int64_t begin = 0; begin < tensor.numel(); begin += kExactElements)
      pieces.push_back(run_of(tensor, begin, std::min(kExactElements, tensor.numel() - begin)));
  }
  return pieces;
}

// ExactSum's arithmetic (base/src/exact_sum.cc), by operations that are exact.
at::Tensor cut(const at::Tensor& terms, double cutter) { return terms.add(cutter).sub_(cutter); }
at::Tensor count(const at::Tensor& cuts, double quantum) { return cuts.div(quantum).to(at::kLong).sum(); }

}  // namespace

void add_into(const at::Tensor& target, const at::Tensor& term) { add_to(target, target, term); }

void add_to(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) { add_run(out, 0, a, b, 0, out.numel()); }

void add_run(const at::Tensor& out, int64_t out_begin, const at::Tensor& a, const at::Tensor& b, int64_t begin,
             int64_t numel) {
  if (out.is_cpu()) return add_floats(mutable_floats(out, out_begin), floats(a, begin), floats(b, begin), numel);
  at::Tensor sum = run_of(out, out_begin, numel);
  at::add_out(sum, run_of(a, begin, numel), run_of(b, begin, numel));
}

void copy_run(const at::Tensor& out, int64_t out_begin, const at::Tensor& in, int64_t begin, int64_t numel) {
  if (out.is_cpu()) {
    std::memcpy(mutable_floats(out, out_begin), floats(in, begin), numel * sizeof(float));
  } else {
    run_of(out, out_begin, numel).copy_(run_of(in, begin, numel));
  }
}

void fill_nothing(const at::Tensor& out, int64_t begin, int64_t numel) {
  if (out.is_cpu()) {
    std::fill_n(mutable_floats(out, begin), numel, kNothing);
  } else {
    run_of(out, begin, numel).fill_(kNothing);
  }
}

ExactSum squares_of(const std::vector<at::Tensor>& tensors) {
  if (!tensors.empty() && !tensors[0].is_cpu()) return squares_by_kernels(tensors);
  ExactSum sum;
  for (const at::Tensor& tensor : tensors)
    sum.add_squares({tensor.const_data_ptr<float>(), static_cast<size_t>(tensor.numel())});
  return sum;
}

ExactSum squares_by_kernels(const std::vector<at::Tensor>& tensors) {
  ExactSum sum;
  const std::vector<at::Tensor> pieces = exact_pieces(tensors);
  if (pieces.empty()) return sum;
  std::vector<at::Tensor> largest, quanta;
  for (const at::Tensor& piece : pieces) largest.push_back(piece.abs().max());
  const at::Tensor bounds = at::stack(largest).cpu();
  std::vector<int> bins;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const double bound = bounds.const_data_ptr<float>()[i];
    if (!std::isfinite(bound)) {
      sum.add(bound);  // the flag is all that counts now
      return sum;
    }
    if (bound == 0) continue;
    const ExactSum::Cut by = ExactSum::cut_for(bound * bound);
    const at::Tensor squares = pieces[i].to(at::kDouble).square_(), high = cut(squares, by.high_cutter);
    quanta.push_back(count(high, by.high_quantum));
    quanta.push_back(count(cut(squares.sub_(high), by.low_cutter), by.low_quantum));
    bins.push_back(by.bin);
  }
  if (bins.empty()) return sum;
  const at::Tensor counts = at::stack(quanta).cpu();
  const auto* numbers = counts.const_data_ptr<int64_t>();
  for (size_t i = 0; i < bins.size(); ++i) sum.add_quanta(bins[i], numbers[2 * i], numbers[2 * i + 1]);
  return sum;
}

}  // namespace lockstep
