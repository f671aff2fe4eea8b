// A micro-batch's key, and LibTorch's random operators made to follow it.
//
// LibTorch has one default generator for all threads of a process. A dispatch key for extensions outside LibTorch's
// tree, included on this thread, puts a kernel of ours in front of each operator that takes a generator: where the
// caller gave none, the thread's own is handed on. Operators without one are not touched, nor slowed down.
#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <lockstep/base/counter_random.h>
#include <lockstep/nn/dropout.h>

namespace lockstep::nn {
namespace {

constexpr c10::DispatchKey kKey = c10::DispatchKey::DeferredInit;  // torchdistx's, which is not here

thread_local StepKey t_key;
thread_local bool t_has_scope = false;

}  // namespace

// One device's generator, made by the first that draws in a scope.
struct StepScope::Stream {
  at::Generator generator;
  uint64_t part;
};

namespace {

thread_local std::vector<StepScope::Stream> t_streams;

const at::Generator& generator_for(at::Device device) {
  auto stream = t_streams.begin();
  while (stream != t_streams.end() && stream->generator.device().type() != device.type()) ++stream;
  const bool is_new = stream == t_streams.end();
  if (is_new) {
    at::Generator shared = at::globalContext().defaultGenerator(device);
    const std::lock_guard lock(shared.mutex());
    stream = t_streams.insert(stream, {shared.clone(), t_key.part});
  }
  if (is_new || stream->part != t_key.part) {
    stream->part = t_key.part;
    stream->generator.set_current_seed(
        stream_key(stream_key(t_key.seed, t_key.step, t_key.leaf, t_key.part), "LibTorch"));
  }
  return stream->generator;
}

bool is_generator(const c10::Argument& argument) {
  const auto* type = argument.type()->castRaw<c10::OptionalType>();
  return type && type->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

void draw(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  c10::IValue* values = stack->data() + (stack->size() - arguments.size());
  const at::Tensor* tensor = nullptr;  // none in what makes a tensor, and fills it by an operator that has one
  for (size_t i = 0; i < arguments.size() && !tensor; ++i) {
    if (values[i].isTensor() && values[i].toTensor().defined()) tensor = &values[i].toTensor();
  }
  if (t_has_scope && tensor && (tensor->is_cpu() || tensor->is_cuda())) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (is_generator(arguments[i]) && values[i].isNone()) values[i] = generator_for(tensor->device());
    }
  }
  op.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kKey), stack);
}

// When the library is loaded: threads that compute must not see it happen.
const bool g_is_registered = [] {
  const auto library = [](const char* name) {
    return new torch::Library(torch::Library::IMPL, name, kKey, __FILE__, __LINE__);  // for as long as anybody computes
  };
  library("_")->fallback(torch::CppFunction::makeFallthrough());
  torch::Library& aten = *library("aten");
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || name.getNamespace() != "aten") continue;
    const auto& arguments = op->schema().arguments();
    if (std::any_of(arguments.begin(), arguments.end(), is_generator))
      aten.impl(toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&draw>());
  }
  return true;
}();

}  // namespace

StepScope::StepScope(StepKey key)
    : was_(std::exchange(t_key, key)),
      had_scope_(std::exchange(t_has_scope, true)),
      streams_were_(std::exchange(t_streams, {})),
      draws_(kKey) {}
StepScope::~StepScope() {
  t_key = was_;
  t_has_scope = had_scope_;
  t_streams = std::move(streams_were_);
}
StepKey step_key() { return t_key; }

void begin_part(uint64_t part) { t_key.part = part; }

}  // namespace lockstep::nn
