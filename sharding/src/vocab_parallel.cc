#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/linear.h>
#include <lockstep/nn/parameter.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/vocab_parallel.h>

#include "rank_sum.h"

namespace lockstep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Chunk: rows of one product. Larger than nn's, because each adds to the whole gradient of the weight: at 50257 classes
// 8 MiB instead of 2 took 511 ms instead of 1192 (bf16, 512 rows, width 768, two ranks), 1001 instead of 1296 in f32.
// Group: chunks whose logits wait for one exchange.
constexpr int64_t kChunkElements = (8 << 20) / 4;
constexpr int64_t kChunksOfGroup = 2;

void check_ids(const char* what, const at::Tensor& ids, int64_t vocab) {
  if (ids.numel() == 0) return;
  const auto [least, most] = at::aminmax(ids);
  LOCKSTEP_CHECK(least.item<int64_t>() >= 0 && most.item<int64_t>() < vocab)
      << what << " from " << least.item<int64_t>() << " to " << most.item<int64_t>() << " for a vocabulary of "
      << vocab;
}

// The loss of rows in order, on this rank's part of the vocabulary.
//
// Local maximum m_r, local sum s_r of exp(logit - m_r) and the target's logit z_r (0 where another rank has it) are all
// that travels: m = max m_r, s = sum s_r exp(m_r - m), z = sum z_r; loss = log s - (z - m). The exponentials stay where
// the logits were and become probabilities by one factor a row, exp(m_r - m) / s.
class VocabLoss {
 public:
  VocabLoss(at::Tensor x, at::Tensor weight, at::Tensor targets, Part part, bool x_needs, bool w_needs,
            const TensorParallel& tp)
      : x_(std::move(x)), weight_(std::move(weight)), targets_(std::move(targets)), part_(part), tp_(tp) {
    if (x_needs) x_grad_ = at::empty_like(x_);
    if (w_needs) w_grad_ = at::zeros(weight_.sizes(), weight_.options().dtype(at::kFloat));
  }

  void run(int64_t widest_part) {  // the same groups on all ranks
    const int64_t chunk = std::max<int64_t>(1, kChunkElements / widest_part), rows = x_.size(0);
    for (int64_t begin = 0; begin < rows; begin += chunk * kChunksOfGroup)
      group(begin, std::min(chunk * kChunksOfGroup, rows - begin), chunk);
  }

  double loss() const { return loss_; }
  const at::Tensor& x_grad() const { return x_grad_; }
  const at::Tensor& w_grad() const { return w_grad_; }

 private:
  void group(int64_t begin, int64_t count, int64_t chunk) {
    const at::Tensor targets = targets_.narrow(0, begin, count), local = targets - part_.begin;
    const at::Tensor is_mine = local.ge(0).logical_and_(local.lt(part_.size)),
                     column = local.clamp(0, part_.size - 1).unsqueeze_(1);
    at::Tensor logits = at::empty({count, part_.size}, x_.options().dtype(at::kFloat)),
               statistics = at::empty({3, count}, logits.options());
    for (int64_t row = 0; row < count; row += chunk) {
      const int64_t n = std::min(chunk, count - row);
      at::Tensor part = logits.narrow(0, row, n), mine = statistics.narrow(1, row, n);
      product(x_.narrow(0, begin + row, n), part);
      mine[2] = part.gather(1, column.narrow(0, row, n)).squeeze(1);
      mine[0] = part.amax(1);
      mine[1] = part.sub_(mine[0].unsqueeze(1)).exp_().sum(1);
    }
    statistics[2].masked_fill_(is_mine.logical_not(), 0);

    at::Tensor all;  // [t, 3, count]
    {
      const metrics::TraceSpan span(tp_.track, "vocabulary-parallel gather", "collective",
                                    {"bytes", static_cast<int64_t>(statistics.nbytes())});
      all = gather_ranks(*tp_.group, statistics, tp_.timeout);
    }
    const at::Tensor most = all.select(1, 0).amax(0), scale = (all.select(1, 0) - most).exp_();
    at::Tensor sum = at::zeros_like(most), right = at::zeros_like(most);
    for (int64_t rank = 0; rank < all.size(0); ++rank) {
      sum.addcmul_(all[rank][1], scale[rank]);
      right.add_(all[rank][2]);
    }
    right.sub_(most);
    const at::Tensor ignored = targets.eq(nn::kIgnore);
    loss_ += (sum.log() - right).masked_fill_(ignored, 0).sum(at::kDouble).item<double>();
    if (!x_grad_.defined() && !w_grad_.defined()) return;

    const at::Tensor factor = (scale[tp_.rank()] / sum).masked_fill_(ignored, 0).unsqueeze_(1),
                     at_target = (right.exp() / sum).sub_(1).unsqueeze_(1);
    for (int64_t row = 0; row < count; row += chunk) {
      const int64_t n = std::min(chunk, count - row);
      at::Tensor slope = logits.narrow(0, row, n).mul_(factor.narrow(0, row, n));
      const at::Tensor here = is_mine.narrow(0, row, n).unsqueeze(1), place = column.narrow(0, row, n);
      slope.scatter_(1, place, at::where(here, at_target.narrow(0, row, n), slope.gather(1, place)));
      gradients(begin + row, slope.to(x_.scalar_type()));
    }
  }

  void product(const at::Tensor& x, at::Tensor& logits) {
    if (x.scalar_type() == at::kFloat)
      at::mm_out(logits, x, weight_.t());
    else
      logits.copy_(at::mm(x, weight_.t()));
  }

  void gradients(int64_t begin, const at::Tensor& slope) {
    if (x_grad_.defined()) {
      at::Tensor out = x_grad_.narrow(0, begin, slope.size(0));
      at::mm_out(out, slope, weight_);
    }
    if (!w_grad_.defined()) return;
    const at::Tensor x = x_.narrow(0, begin, slope.size(0));
    if (slope.scalar_type() == at::kFloat)
      w_grad_.addmm_(slope.t(), x);
    else
      w_grad_.add_(at::mm(slope.t(), x));
  }

  at::Tensor x_, weight_, targets_, x_grad_, w_grad_;
  Part part_;
  TensorParallel tp_;
  double loss_ = 0;
};

// Gradients are made in the forward pass, for a gradient of 1, and scaled in the backward one.
struct VocabParallelCrossEntropy : Function<VocabParallelCrossEntropy> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_in, const at::Tensor& weight,
                            const at::Tensor& targets, int64_t vocab, const TensorParallel& tp, bool with_grad) {
    const bool bf16 = nn::is_bf16() || x_in.scalar_type() == at::kBFloat16;  // asked first: the guard hides autocast
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const std::vector<Part> parts = even_parts(vocab, tp.size());
    const auto type = bf16 ? at::kBFloat16 : x_in.scalar_type();
    VocabLoss loss(x_in.contiguous().to(type), weight.to(type), targets, parts[tp.rank()],
                   with_grad && x_in.requires_grad(), with_grad && weight.requires_grad(), tp);
    loss.run(parts[0].size);
    ctx->saved_data["x_type"] = static_cast<int64_t>(x_in.scalar_type());
    ctx->save_for_backward({loss.x_grad(), loss.w_grad()});
    return at::full({}, loss.loss(), x_in.options().dtype(at::kFloat));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto scale = static_cast<double>(grads[0].item<float>());
    at::Tensor x_grad, w_grad;
    if (saved[0].defined())
      x_grad = saved[0].to(static_cast<at::ScalarType>(ctx->saved_data["x_type"].toInt())).mul(scale);
    if (saved[1].defined()) w_grad = saved[1].mul(scale);
    return {x_grad, w_grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

VocabParallelEmbedding::VocabParallelEmbedding(int64_t vocab, int64_t dim, const TensorParallel& tp)
    : tp_(tp), vocab_(vocab), dim_(dim), parts_(even_parts(vocab, tp.size())) {
  weight = register_parameter("weight", nn::new_parameter({parts_[tp.rank()].size, dim}));
}

at::Tensor VocabParallelEmbedding::forward(const at::Tensor& ids_BT) {
  if (!tp_.is_parallel()) return at::embedding(weight, ids_BT);
  check_ids("ids", ids_BT, vocab_);
  const Part part = parts_[tp_.rank()];
  const at::Tensor local = ids_BT - part.begin, elsewhere = local.lt(0).logical_or_(local.ge(part.size));
  const at::Tensor rows = at::embedding(weight, local.masked_fill(elsewhere, 0));
  return leave_region(rows.masked_fill(elsewhere.unsqueeze(-1), 0), tp_);
}

ParameterPlacement VocabParallelEmbedding::placement(const std::string&) const {
  ParameterPlacement placement;
  placement.shape = {vocab_, dim_};
  placement.tensor_dim = 0;
  placement.parts = parts_;
  return placement;
}

at::Tensor vocab_parallel_cross_entropy_sum(const at::Tensor& x_BTC, const at::Tensor& weight, int64_t vocab,
                                            const at::Tensor& targets_BT, const TensorParallel& tp) {
  const at::Tensor targets = targets_BT.reshape({-1});
  if (!tp.is_parallel()) return nn::linear_cross_entropy_sum(x_BTC.reshape({-1, x_BTC.size(-1)}), weight, targets);
  LOCKSTEP_CHECK(weight.dim() == 2 && weight.size(1) == x_BTC.size(-1) &&
                 weight.size(0) == even_parts(vocab, tp.size())[tp.rank()].size)
      << "cross-entropy of x " << x_BTC.sizes() << " with rank " << tp.rank() << "'s part " << weight.sizes() << " of "
      << vocab << " classes over " << tp.size() << " ranks";
  const at::Tensor x = enter_region(x_BTC, tp).reshape({-1, x_BTC.size(-1)});
  LOCKSTEP_CHECK(targets.scalar_type() == at::kLong && targets.size(0) == x.size(0))
      << "targets " << targets_BT.sizes() << " " << targets.scalar_type() << " for " << x.size(0) << " rows";
  check_ids("targets", targets.masked_select(targets.ne(nn::kIgnore)), vocab);
  // Inside a Function gradients are off and tensors still say that they require one.
  return VocabParallelCrossEntropy::apply(x, weight, targets, vocab, tp, at::GradMode::is_enabled());
}

}  // namespace lockstep
