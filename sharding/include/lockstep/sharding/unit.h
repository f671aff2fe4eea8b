#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <torch/nn/module.h>

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

/// A layer that the runtime may treat on its own: what ZeRO-3 gathers and frees together, what recomputation forgets.
/// It is its layer: parameter names, members and type stay, only forward() takes a detour. Mark the repeated blocks of
/// a model, and its large ends:
///
///     block_ = register_module("block0", unit<Block>(width, heads));
///     y = block_->forward(x);
///
/// forward() takes the layer's arguments by value (tensors are handles) and returns a tensor. Call it once a
/// micro-batch.
template <class Layer>
class Unit : public Layer, public UnitBase {
 public:
  template <class... Args>
  explicit Unit(Args&&... args) : Layer(std::forward<Args>(args)...) {
    drop_storage(*this);
  }

  template <class... Args>
  at::Tensor forward(Args... args) {
    return call([this, args...] { return Layer::forward(args...); });
  }
};

template <class Layer, class... Args>
std::shared_ptr<Unit<Layer>> unit(Args&&... args) {
  return std::make_shared<Unit<Layer>>(std::forward<Args>(args)...);
}

/// Within this scope, on this thread, units are built without memory for their parameters: one unit at a time exists
/// for a moment, never the model. Their values come from Task::initialize or a checkpoint, shard by shard.
class WithoutStorage {
 public:
  WithoutStorage();
  ~WithoutStorage();
  WithoutStorage(const WithoutStorage&) = delete;
  WithoutStorage& operator=(const WithoutStorage&) = delete;

 private:
  bool was_;
};

/// A unit as found in a model, with the names of its parameters in the model.
struct FoundUnit {
  std::string name;  ///< of the module; empty: what lies in no unit
  UnitBase* unit = nullptr;
  std::vector<std::string> parameter_names;
};

/// The units of a model in order of registration; parameters in no unit come first, as one entry without a unit, if
/// there are any. @throws ConfigError a unit inside a unit.
std::vector<FoundUnit> find_units(torch::nn::Module& model);

}  // namespace lockstep
