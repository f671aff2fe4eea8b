#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/functions.h>
#include <lockstep/nn/precision.h>
#include <lockstep/sharding/context_parallel.h>

namespace lockstep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

constexpr int kKeysTag = 1, kGradsTag = 2;

struct KeptContext : torch::CustomClassHolder {
  explicit KeptContext(const ContextParallel& parallel) : cp(parallel) {}
  ContextParallel cp;
};

// A tensor on its way to the next rank of the ring while another comes from the one before.
class Hop {
 public:
  Hop(at::Tensor outgoing, int tag, const ContextParallel& cp)
      : track_(cp.track),
        incoming_(at::empty_like(outgoing)),
        received_(cp.group->recv(incoming_, before(cp), tag, cp.timeout)) {
    sent_ = cp.group->send(std::move(outgoing), after(cp), tag, cp.timeout);
  }
  at::Tensor wait() {
    const metrics::TraceSpan span(track_, "wait for ring attention", "collective",
                                  {"bytes", static_cast<int64_t>(incoming_.nbytes())});
    received_.wait();
    sent_.wait();
    return incoming_;
  }

 private:
  static int before(const ContextParallel& cp) { return (cp.rank() + cp.size() - 1) % cp.size(); }
  static int after(const ContextParallel& cp) { return (cp.rank() + 1) % cp.size(); }

  metrics::TraceTrack track_;
  at::Tensor incoming_;
  Work received_, sent_;
};

// What of this rank's queries meets what of the keys that `owner` brought. The rest of a causal block is masked as a
// whole: our chunks are i and 2c-1-i, theirs j and 2c-1-j.
struct Meeting {
  int64_t query_begin, queries, keys;
  bool causal;
};
Meeting meeting(int owner, bool causal, int64_t length, const ContextParallel& cp) {
  if (!causal) return {0, length, length, false};
  if (owner == cp.rank()) return {0, length, length, true};      // chunks in order: plain causal
  if (owner < cp.rank()) return {0, length, length / 2, false};  // their first is before both of ours
  return {length / 2, length - length / 2, length, false};       // both are before our second only
}

// Heads before tokens, as LibTorch's kernel wants it.
at::Tensor heads_first(const at::Tensor& x) { return x.transpose(1, 2); }

// Attention so far: output and logarithm of the sum of exponentials a row.
struct Merged {
  at::Tensor out, log_sum;  // f32 [B, heads, T, D], [B, heads, T]

  void add(int64_t begin, const at::Tensor& block_out, const at::Tensor& block_log_sum) {
    if (!out.defined()) {
      out = block_out.to(at::kFloat).clone(at::MemoryFormat::Contiguous);
      log_sum = block_log_sum.to(at::kFloat).clone(at::MemoryFormat::Contiguous);
      return;
    }
    at::Tensor old_out = out.narrow(2, begin, block_out.size(2)),
               old_log_sum = log_sum.narrow(2, begin, block_out.size(2));
    const at::Tensor both = at::logaddexp(old_log_sum, block_log_sum);
    old_out.mul_((old_log_sum - both).exp_().unsqueeze(-1));
    old_out.addcmul_(block_out.to(at::kFloat), (block_log_sum - both).exp_().unsqueeze(-1));
    old_log_sum.copy_(both);
  }
};

struct RingAttention : Function<RingAttention> {
  // q [B, T, heads, D]; keys [2, B, T, kv_heads, D]: k and v.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q_in, const at::Tensor& keys_in, bool causal,
                            const ContextParallel& cp) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor q = heads_first(q_in);
    at::Tensor keys = keys_in;
    Merged merged;
    for (int step = 0; step < cp.size(); ++step) {
      std::optional<Hop> hop;
      if (step + 1 < cp.size()) hop.emplace(keys, kKeysTag, cp);
      const Meeting m = meeting((cp.rank() + cp.size() - step) % cp.size(), causal, q.size(2), cp);
      const auto [out, log_sum] = at::_scaled_dot_product_flash_attention_for_cpu(
          q.narrow(2, m.query_begin, m.queries), block_keys(keys[0], m), block_keys(keys[1], m), 0.0, m.causal);
      merged.add(m.query_begin, out, log_sum);
      if (hop) keys = hop->wait();
    }
    const at::Tensor out = merged.out.to(q.scalar_type());
    ctx->saved_data["cp"] = c10::IValue::make_capsule(c10::make_intrusive<KeptContext>(cp));
    ctx->saved_data["causal"] = causal;
    ctx->save_for_backward({q_in, keys_in, out, merged.log_sum});
    return heads_first(out).flatten(2);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const ContextParallel cp = c10::static_intrusive_pointer_cast<KeptContext>(ctx->saved_data["cp"].toCapsule())->cp;
    const bool causal = ctx->saved_data["causal"].toBool();
    const at::Tensor q = heads_first(saved[0]), &out = saved[2], &log_sum = saved[3],
                     grad = heads_first(grads[0].to(q.scalar_type()).view(saved[0].sizes()));
    at::Tensor keys = saved[1], q_grad = at::zeros(q.sizes(), q.options().dtype(at::kFloat)), keys_grad;
    std::optional<Hop> grads_hop;
    for (int step = 0; step < cp.size(); ++step) {
      std::optional<Hop> hop;
      if (step + 1 < cp.size()) hop.emplace(keys, kKeysTag, cp);
      const Meeting m = meeting((cp.rank() + cp.size() - step) % cp.size(), causal, q.size(2), cp);
      const auto rows = [&](const at::Tensor& x) { return x.narrow(2, m.query_begin, m.queries); };
      const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          rows(grad), rows(q), block_keys(keys[0], m), block_keys(keys[1], m), rows(out), rows(log_sum), 0.0, m.causal);
      rows(q_grad).add_(dq);
      // What the ranks before added to the gradients of these keys comes only now, behind the keys.
      keys_grad = grads_hop ? grads_hop->wait() : at::zeros(keys.sizes(), keys.options().dtype(at::kFloat));
      add_keys_grad(keys_grad[0], dk, m);
      add_keys_grad(keys_grad[1], dv, m);
      grads_hop.emplace(keys_grad, kGradsTag, cp);
      if (hop) keys = hop->wait();
    }
    keys_grad = grads_hop->wait();  // the last hop brings our own keys' home
    return {heads_first(q_grad).to(q.scalar_type()), keys_grad.to(keys.scalar_type()), at::Tensor(), at::Tensor()};
  }

 private:
  static at::Tensor block_keys(const at::Tensor& keys, const Meeting& m) {
    return heads_first(keys.narrow(1, 0, m.keys));
  }
  static void add_keys_grad(const at::Tensor& sum, const at::Tensor& grad, const Meeting& m) {
    sum.narrow(1, 0, m.keys).add_(heads_first(grad));
  }
};

}  // namespace

at::Tensor context_positions(int64_t length, const ContextParallel& cp) {
  return context_slice(at::arange(length, at::kLong), 0, cp);
}

at::Tensor context_slice(const at::Tensor& x, int64_t dim, const ContextParallel& cp) {
  if (cp.size() == 1) return x;
  const int64_t length = x.size(dim), chunks = 2 * int64_t{cp.size()}, chunk = length / chunks;
  if (length % chunks != 0) {
    throw ConfigError("a sequence of " + std::to_string(length) + " tokens can not be cut into " +
                      std::to_string(chunks) + " chunks for " + std::to_string(cp.size()) +
                      " ranks; make --sequence_length a multiple of 2 x --context_parallel_size");
  }
  return at::cat({x.narrow(dim, cp.rank() * chunk, chunk), x.narrow(dim, (chunks - 1 - cp.rank()) * chunk, chunk)},
                 dim);
}

at::Tensor ring_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal,
                          const ContextParallel& cp) {
  if (cp.size() == 1) return nn::attention(q, k, v, causal);
  LOCKSTEP_CHECK(q.dim() == 4 && k.sizes() == v.sizes() && k.size(1) == q.size(1) && q.size(2) % k.size(2) == 0 &&
                 q.size(1) % 2 == 0)
      << "ring attention of q " << q.sizes() << ", k " << k.sizes() << ", v " << v.sizes()
      << ": [B, T/c, heads, D], T/c even and heads a multiple of kv_heads";
  const auto type = nn::is_bf16() ? at::kBFloat16 : q.scalar_type();
  return RingAttention::apply(q.to(type), at::stack({k.to(type), v.to(type)}), causal, cp);
}

}  // namespace lockstep
