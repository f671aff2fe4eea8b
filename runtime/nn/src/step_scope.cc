// A micro-batch's key, and LibTorch's random operators made to follow it.
//
// LibTorch has one default generator for all threads of a process. A dispatch key for extensions outside LibTorch's
// tree, included on this thread, puts a kernel of ours in front of each operator that takes a generator: where the
// caller gave none, the thread's own is handed on. Operators without one are not touched, nor slowed down. On a GPU
// some fused ones never ask; there one thread computes, so that the default generator can be seeded (library_seed).
#include <algorithm>
#include <memory>
#include <utility>

#include <ATen/CPUGeneratorImpl.h>
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

struct StepScope::Stream {
  at::Generator generator;
  uint64_t part;  // that it was last seeded for
};

namespace {

thread_local std::unique_ptr<StepScope::Stream> t_stream;  // made by the first that draws in a scope

const at::Generator& own_generator() {
  const bool is_new = !t_stream;
  if (is_new) t_stream.reset(new StepScope::Stream{at::detail::createCPUGenerator(), t_key.part});
  if (is_new || t_stream->part != t_key.part) t_stream->generator.set_current_seed(library_seed(t_key));
  t_stream->part = t_key.part;
  return t_stream->generator;
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
  for (size_t i = 0; i < arguments.size() && t_has_scope && tensor && tensor->is_cpu(); ++i) {
    if (is_generator(arguments[i]) && values[i].isNone()) values[i] = own_generator();
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
      stream_was_(std::exchange(t_stream, nullptr)),
      draws_(kKey) {}
StepScope::~StepScope() {
  t_key = was_;
  t_has_scope = had_scope_;
  t_stream = std::move(stream_was_);
}
StepKey step_key() { return t_key; }

uint64_t library_seed(const StepKey& key) {
  return stream_key(stream_key(key.seed, key.step, key.leaf, key.part), "LibTorch");
}

void begin_part(uint64_t part) { t_key.part = part; }

}  // namespace lockstep::nn
