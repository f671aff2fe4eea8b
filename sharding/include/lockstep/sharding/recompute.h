#pragma once

#include <functional>

#include <ATen/core/Tensor.h>

namespace lockstep {

/// What backward needs of a layer: keep it, or make it again.
enum class Recompute {
  kNone,       ///< keep all
  kSelective,  ///< keep outputs of products and attention; make outputs of cheap functions (nn/remake.h) again
  kFull,       ///< keep the layer's input only; run the layer again
};

struct RecomputeHooks {
  /// Called in backward around each run of saved code, on the thread that runs backward; `after_rerun` also when that
  /// code throws. Inside, weights that the code reads must be there: a sharder gathers and frees them here.
  std::function<void()> before_rerun, after_rerun;
  /// kFull: the second run goes on to its end and is compared with the first: number of tensors and bits of the output
  /// (CPU tensors). Costs the layer's last product and a digest.
  bool is_checked = false;
};

/// Runs a layer so that its activations are not kept for backward, which makes them again. Gradients have the bits that
/// kNone gives.
///
/// Full: the first tensor that backward asks for runs `body` again, to the point where all that backward needs is
/// there, and later ones are handed out of that run, each dropped when its operation is done. It is no backward within
/// a backward: hooks on gradients fire once, at the right level, and no input has to require grad. Selective: each
/// cheap output is made again on its own when a product's backward asks for it.
///
/// The second run gets the StepScope, autocast state, grad mode and WeightCacheScope of the first, so that it draws the
/// same numbers, by LibTorch's operators too; generators outside of a StepScope are not put back. `body` must do the
/// same both times and have no effect but its output: it is kept, with all it captured, until backward is done. Capture
/// tensors by value. Parameters (leaves that require grad) are kept themselves, never their bytes: their storage may be
/// freed and filled again in between. Nested calls: the outermost decides, inner ones run as if kNone. Repeated
/// backward with retain_graph works and runs `body` again. Threads: any number at once, each its own layers. Streams:
/// those of the thread that runs backward.
/// @throws CheckFailed in backward, when the second run saves other tensors than the first (number, shape, dtype,
/// version), or an input was changed in place in between.
/// Cost: full about a forward less its last product, of the layer's memory its input; selective a few per cent.
/// Source: Chen et al., arXiv:1604.06174; selective: Korthikanti et al., arXiv:2205.05198.
at::Tensor recompute(Recompute how, const std::function<at::Tensor()>& body, const RecomputeHooks& hooks = {});

/// The same, full.
inline at::Tensor recompute(const std::function<at::Tensor()>& body, const RecomputeHooks& hooks = {}) {
  return recompute(Recompute::kFull, body, hooks);
}

}  // namespace lockstep
