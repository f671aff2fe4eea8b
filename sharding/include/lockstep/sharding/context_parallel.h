#pragma once

#include <ATen/core/Tensor.h>

#include <lockstep/collectives/process_group.h>
#include <lockstep/metrics/trace.h>

namespace lockstep {

/// How a sequence is cut over the ranks of a context-parallel group: into 2c chunks, of which rank i holds chunk i and
/// then chunk 2c-1-i, so that causal attention costs all ranks the same. A null group, or one of size 1: not at all.
///
/// Everything but attention works on this rank's tokens as if they were all; parameters' gradients are summed over the
/// context axis like over the data axis. The group must outlive graphs made with it and is used by one thread at a
/// time.
struct ContextParallel {
  ProcessGroup* group = nullptr;
  Milliseconds timeout = ProcessGroup::kDefaultTimeout;
  metrics::TraceTrack track{};  ///< has a span for each exchange

  int size() const { return group ? group->size() : 1; }
  int rank() const { return group ? group->rank() : 0; }
};

/// Positions of this rank's tokens in a sequence of `length`: i64 [length / c], rising.
/// @throws ConfigError the length is no multiple of 2c.
at::Tensor context_positions(int64_t length, const ContextParallel& cp);

/// This rank's part of `x` along `dim`, contiguous: of tokens, targets, RoPE tables, learned positions. Differentiable.
/// On one rank x itself. @throws ConfigError as above.
at::Tensor context_slice(const at::Tensor& x, int64_t dim, const ContextParallel& cp);

/// nn::attention over the whole sequence, of which each rank has its slice. On one rank it is nn::attention.
///
/// Keys and values travel round the ring, c-1 hops, while the block before is computed; blocks are merged by their
/// logarithms of sums in f32. Backward sends them round again, with their gradients in f32 behind them.
/// q [B, T/c, heads, D]; k, v [B, T/c, kv_heads, D] with heads a multiple of kv_heads. @return [B, T/c, heads * D].
/// Collective over the group, in backward too. Cost: per rank, sent: (c-1) x bytes of its k and v forward; twice that
/// and their f32 gradients c times backward.
/// Source: Liu, Zaharia, Abbeel, arXiv:2310.01889; the balance by 2c chunks: Llama 3, arXiv:2407.21783, 3.3.2.
at::Tensor ring_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                          const ContextParallel& cp);

}  // namespace lockstep
