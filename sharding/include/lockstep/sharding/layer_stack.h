#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/sharding/unit.h>

namespace lockstep {

/// One layer of a stack; also a unit (unit.h).
class StackLayer : public torch::nn::Module, public UnitBase {
 public:
  /// @param x      what the layer before returned; undefined for the first.
  /// @param batch  the micro-batch's tensors, for the first layer (inputs) and the last (targets).
  /// @return a tensor; the last layer's is the loss, summed over the micro-batch, when batch holds targets.
  virtual at::Tensor forward(at::Tensor x, const std::vector<at::Tensor>& batch) = 0;

  at::Tensor operator()(const at::Tensor& x, const std::vector<at::Tensor>& batch) {
    return call([this, x, batch] { return forward(x, batch); });
  }
};

/// Two names for one weight, e.g. a language model's embedding and its head: "embedding.weight", "head.weight". The
/// first use in forward order owns the values; checkpoints hold it under that name.
struct Tie {
  std::string first, second;
};

/// A model as a list of layers, from which the runtime builds those of one pipeline stage, or all. The only form of
/// model that a pipeline can cut; every other kind of parallelism takes any module.
class LayerStack : public torch::nn::Module {
 public:
  struct Layer {
    std::string name;  ///< of the submodule: parameters are "<name>.<parameter>"
    std::function<std::shared_ptr<StackLayer>()> make;
    double cost = 1;  ///< of forward and backward, in any unit: stages are cut so that the largest is small
  };

  explicit LayerStack(std::vector<Layer> layers, std::vector<Tie> ties = {});

  size_t num_layers() const { return layers_.size(); }
  std::vector<double> costs() const;
  const std::vector<Tie>& ties() const { return ties_; }

  /// Builds layers [begin, end) of each chunk; once, before anything else. Ties inside share their storage.
  struct Range {
    size_t begin = 0, end = 0;
  };
  void build(const std::vector<Range>& chunks);
  void build() { build({{0, layers_.size()}}); }

  /// The chunk that a layer was built for.
  size_t chunk_of(const std::string& layer) const;

  /// Runs the layers of a chunk.
  at::Tensor run(size_t chunk, at::Tensor x, const std::vector<at::Tensor>& batch);
  /// Runs the whole model on a micro-batch; inside run_stage(), one chunk of it.
  at::Tensor forward(const std::vector<at::Tensor>& batch);

  /// Runs `whole`, which computes a loss by one call of forward(), as far as it goes here: forward() runs the layers of
  /// `chunk` on `x`, what the chunk before returned, and is left by an exception unless the chunk is the last.
  /// @return the chunk's output. @throws ConfigError `whole` calls forward() otherwise.
  at::Tensor run_stage(size_t chunk, at::Tensor x, bool is_last, const std::function<void()>& whole);

 private:
  struct Stage {
    size_t chunk;
    at::Tensor x;
    bool is_last;
    std::optional<at::Tensor> output;
  };
  std::shared_ptr<StackLayer> make(const Layer& layer);

  std::vector<Layer> layers_;
  std::vector<Tie> ties_;
  std::vector<Range> chunks_;
  std::vector<std::shared_ptr<StackLayer>> built_;  // by layer; null where another stage has it
  std::optional<Stage> stage_;                      // within run_stage()
};

}  // namespace lockstep
