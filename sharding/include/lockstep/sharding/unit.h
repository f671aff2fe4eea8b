#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/nn/parameter.h>

namespace lockstep {

/// What happens around a unit's forward and backward: weights gathered before and freed after, activations made again.
class UnitRuntime {
 public:
  virtual ~UnitRuntime() = default;
  /// Runs `body`, the unit's forward, whose arguments it owns: it may be run again in backward.
  virtual at::Tensor call(size_t unit, const std::function<at::Tensor()>& body) = 0;
};

/// The part of a unit that does not depend on its layer.
class UnitBase {
 public:
  UnitBase() = default;
  virtual ~UnitBase() = default;
  UnitBase(const UnitBase&) = delete;
  UnitBase& operator=(const UnitBase&) = delete;

  /// From now on calls go through `runtime`, as unit `number`. Null: straight to the layer.
  void bind(UnitRuntime* runtime, size_t number) {
    runtime_ = runtime;
    number_ = number;
  }

  /// Inside a WithoutStorage scope, gives the memory of a new layer's parameters back: shapes stay.
  static void drop_storage(torch::nn::Module& layer);

 protected:
  at::Tensor call(const std::function<at::Tensor()>& body) { return runtime_ ? runtime_->call(number_, body) : body(); }

 private:
  UnitRuntime* runtime_ = nullptr;
  size_t number_ = 0;
};

namespace unit_detail {

/// The class behind a holder (TORCH_MODULE), or the class itself.
template <class T>
struct LayerOf {
  using Type = T;
};
template <class Holder>
requires requires { typename Holder::ContainedType; }
struct LayerOf<Holder> {
  using Type = typename Holder::ContainedType;
};

/// forward() of a layer, where it has one only.
template <class Layer>
constexpr auto forward_of() {
  if constexpr (requires { &Layer::forward; }) return &Layer::forward;
}

/// Whether forward() has a default for its last argument.
template <class Layer, class Args, size_t... I>
constexpr bool has_default(std::index_sequence<I...>) {
  return requires(Layer & layer, std::tuple_element_t<I, Args>... args) { layer.forward(args...); };
}

/// A layer and the way into it. This one has any forward(): overloads, templates, defaults.
template <class Layer, class Forward>
class Detour : public Layer, public UnitBase {
 public:
  using Layer::Layer;

  template <class... Args>
  at::Tensor forward(Args... args) {
    return call([this, args...] { return Layer::forward(args...); });
  }
};

/// This one is declared as the layer's: torch::nn::Sequential asks for its address, and a virtual one is overridden.
template <class Layer, class Owner, class First, class... Rest>
requires(!has_default<Layer, std::tuple<First, Rest...>>(
    std::index_sequence_for<Rest...>())) class Detour<Layer, at::Tensor (Owner::*)(First, Rest...)> : public Layer,
                                                                                                      public UnitBase {
 public:
  using Layer::Layer;

  at::Tensor forward(First first, Rest... rest) {
    return call([this, first, rest...] { return Layer::forward(first, rest...); });
  }
};

template <class Layer>
using DetourOf = Detour<Layer, decltype(forward_of<Layer>())>;

}  // namespace unit_detail

/// A layer that the runtime may treat on its own: what ZeRO-3 gathers and frees together, what recomputation forgets.
/// It is its layer: parameter names, members and type stay, only forward() takes a detour. Mark the repeated blocks of
/// a model, and its large ends:
///
///     std::shared_ptr<Unit<Block>> block_ = register_module("block0", unit<Block>(width, heads));
///     y = block_->forward(x);
///
///     torch::nn::Sequential blocks(unit<Block>(width, heads), unit<Block>(width, heads));
///
/// `Layer` is a module class or its holder (`unit<torch::nn::Linear>(4, 8)`). forward() returns a tensor; its arguments
/// are copied (tensors are handles), for it may run again in backward. Call it once a micro-batch, and through a
/// pointer to the Unit: through a pointer to its layer the detour is missed, unless forward() is virtual.
template <class Layer>
class Unit : public unit_detail::DetourOf<typename unit_detail::LayerOf<Layer>::Type> {
 public:
  template <class... Args>
  explicit Unit(Args&&... args)
      : unit_detail::DetourOf<typename unit_detail::LayerOf<Layer>::Type>(std::forward<Args>(args)...) {
    UnitBase::drop_storage(*this);
  }
};

template <class Layer, class... Args>
std::shared_ptr<Unit<Layer>> unit(Args&&... args) {
  return std::make_shared<Unit<Layer>>(std::forward<Args>(args)...);
}

/// Within this scope, on this thread, units are built without memory for their parameters: one unit at a time exists
/// for a moment, never the model. Their values come from Task::initialize or a checkpoint, shard by shard.
using nn::WithoutStorage;

/// A unit as found in a model, with the names of its parameters in the model.
struct FoundUnit {
  std::string name;  ///< of the module; empty: what lies in no unit
  UnitBase* unit = nullptr;
  std::vector<std::string> parameter_names;  ///< a tensor with several names is there under all of them
};

/// The units of a model in order of registration. Parameters in no unit come first, as one entry without a unit, if
/// there are any. A tensor that a unit shares with another one, or with what lies outside, is in no unit: it must stay
/// while either is used. Units to which that leaves nothing come last. @throws ConfigError a unit inside a unit.
std::vector<FoundUnit> find_units(torch::nn::Module& model);

}  // namespace lockstep
