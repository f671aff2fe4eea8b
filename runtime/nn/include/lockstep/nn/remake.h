#pragma once

#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace lockstep::nn {

/// Hears how the outputs of this library's cheap functions (norms, gelu, swiglu, rope, dropout's mask) can be made
/// again from their inputs, so that whoever saves tensors for backward may drop such an output and make it when it is
/// needed. Products and attention say nothing: theirs are the outputs worth keeping.
class RemakeListener {
 public:
  /// The bits of the output, given the same inputs, StepScope, autocast state and no grad mode.
  using Make = std::function<at::Tensor(const std::vector<at::Tensor>& inputs)>;

  virtual ~RemakeListener() = default;
  /// @param output fresh memory that nothing else shares. Called before anything can save it.
  virtual void made(const at::Tensor& output, const std::vector<at::Tensor>& inputs, Make make) = 0;
};

/// This thread's listener for the scope; nullptr: nobody listens.
class RemakeScope {
 public:
  explicit RemakeScope(RemakeListener* listener);
  ~RemakeScope();
  RemakeScope(const RemakeScope&) = delete;
  RemakeScope& operator=(const RemakeScope&) = delete;

  static RemakeListener* listener();

 private:
  RemakeListener* was_;
};

/// Tells the listener, if there is one. @return output. A function of a task's own may say so too.
template <typename Make>
at::Tensor remakeable(at::Tensor output, std::initializer_list<at::Tensor> inputs, Make make) {
  if (RemakeListener* listener = RemakeScope::listener()) listener->made(output, inputs, std::move(make));
  return output;
}

}  // namespace lockstep::nn
