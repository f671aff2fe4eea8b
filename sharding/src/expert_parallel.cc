#include <numeric>

#include <torch/autograd.h>
#include <torch/types.h>

#include <lockstep/sharding/expert_parallel.h>

namespace lockstep {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct KeptExchange : torch::CustomClassHolder {
  KeptExchange(std::vector<int64_t> sent, std::vector<int64_t> received, const ExpertParallel& parallel)
      : send(std::move(sent)), receive(std::move(received)), ep(parallel) {}
  std::vector<int64_t> send, receive;
  ExpertParallel ep;
};

at::Tensor exchanged(const at::Tensor& rows, std::vector<int64_t> send, std::vector<int64_t> receive,
                     const ExpertParallel& ep) {
  const int64_t width = rows.size(1), count = std::accumulate(receive.begin(), receive.end(), int64_t{0});
  at::Tensor received = at::empty({count, width}, rows.options().requires_grad(false));
  for (int64_t& rows_of_rank : send) rows_of_rank *= width;  // from here on elements
  for (int64_t& rows_of_rank : receive) rows_of_rank *= width;
  const metrics::TraceSpan span(ep.track, "exchange tokens of experts", "collective",
                                {"bytes", static_cast<int64_t>(received.nbytes())});
  ep.group->all_to_all(received, rows.contiguous(), receive, send, ep.timeout).wait();
  return received;
}

struct ExchangeRows : Function<ExchangeRows> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& rows, const std::vector<int64_t>& send,
                            const std::vector<int64_t>& receive, const ExpertParallel& ep) {
    ctx->saved_data["exchange"] = c10::IValue::make_capsule(c10::make_intrusive<KeptExchange>(send, receive, ep));
    return exchanged(rows, send, receive, ep);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto kept = c10::static_intrusive_pointer_cast<KeptExchange>(ctx->saved_data["exchange"].toCapsule());
    return {exchanged(grads[0], kept->receive, kept->send, kept->ep), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor exchange_rows(const at::Tensor& rows, const std::vector<int64_t>& send, const std::vector<int64_t>& receive,
                         const ExpertParallel& ep) {
  return ep.size() > 1 ? ExchangeRows::apply(rows, send, receive, ep) : rows;
}

}  // namespace lockstep
