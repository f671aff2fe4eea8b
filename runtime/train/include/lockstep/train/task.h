#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <torch/nn/module.h>

#include <lockstep/data/dataset.h>
#include <lockstep/optim/optimizer.h>
#include <lockstep/sharding/model_parallel.h>

namespace lockstep::train {

/// A loss as a sum, so that it can be divided by the global count of a step (never a mean of means).
struct LossSum {
  at::Tensor sum;      ///< scalar, f32, with graph
  at::Tensor correct;  ///< optional scalar: e.g. right answers, summed exactly into the accuracy
};

/// What a user writes: the model, the data, a loss. The Trainer owns all the rest.
/// Threads: model-touching members are called from one thread per lane, each with its own instance of the model.
class Task {
 public:
  virtual ~Task() = default;
  virtual std::string name() const = 0;  ///< "gpt": run record, log lines

  /// Builds one instance of the model. Called once a lane; instances then share parameter storage. Values are set by
  /// initialize(). Units (sharding/unit.h) and stacks (sharding/layer_stack.h) are what ZeRO-3, recomputation and
  /// pipelines go by.
  virtual std::shared_ptr<torch::nn::Module> make_model();
  /// The same, its layers cut over the ranks of tensor- and context-parallel groups (sharding/tensor_parallel.h).
  /// Default: make_model(), which no such group may cut. Override one of the two.
  virtual std::shared_ptr<torch::nn::Module> make_model(const ModelParallel& parallel);
  /// Fills one parameter from `seed`, from a stream keyed by its name, so that no layout changes it.
  /// @param parameter the whole tensor, though no rank may ever have the whole model. Where a rank keeps a part of it,
  /// this may be called twice; one call of nn/init.h and nothing else draws that part alone.
  virtual void initialize(const std::string& name, const at::Tensor& parameter, uint64_t seed) = 0;

  virtual std::shared_ptr<const data::Dataset> training_data() = 0;
  virtual std::shared_ptr<const data::Dataset> validation_data() { return nullptr; }

  /// What a batch counts for in the loss's divisor: tokens, samples, boxes. Known before any forward.
  virtual int64_t count(const data::Batch& batch) = 0;
  /// Forward and loss of one micro-batch. Default, for a LayerStack: what the stack returns for the batch's tensors.
  /// In a pipeline every stage calls this, on its own layers: call the stack's forward once; it comes back on the last
  /// stage alone. Random numbers drawn inside by LibTorch's operators depend on seed, step and micro-batch only.
  virtual LossSum loss(torch::nn::Module& model, const data::Batch& batch);

  /// Whether weight decay applies. Default: tensors of two and more dims.
  virtual bool decays(const std::string& name, const at::Tensor& parameter);
  virtual std::unique_ptr<optim::Optimizer> make_optimizer(double weight_decay);  ///< default AdamW
  /// Flops of forward and backward for one counted unit (for mfu); 0: unknown.
  virtual double flops_per_count() { return 0; }
  virtual const char* count_unit() const { return "samples"; }  ///< "tokens"
  /// Whether finished() wants a model: where the layout has cut it, rank 0 then puts it together.
  virtual bool wants_finished_model() const { return false; }
  /// After the last step, on rank 0: print a sample, a confusion matrix.
  virtual void finished(torch::nn::Module&) {}
  /// Options of the task that decide the bits, as JSON text, for the run record and the config diff on resume.
  virtual std::string config_json() const { return "{}"; }
};

}  // namespace lockstep::train
