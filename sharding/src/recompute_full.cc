#include <mutex>
#include <vector>

#include <ATen/ops/empty.h>

#include <lockstep/base/error.h>
#include <lockstep/format/checksum.h>

#include "saver.h"

namespace lockstep {
namespace {

using torch::autograd::SavedVariableHooks;

// What must be alike of a saved tensor in both runs. The version tells of inputs changed in place.
struct Description {
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;
  int64_t version;

  explicit Description(const at::Tensor& tensor)
      : sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        dtype(tensor.scalar_type()),
        version(tensor._version()) {}
  bool operator==(const Description&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Description& tensor) {
  return out << at::IntArrayRef(tensor.sizes) << " strides " << at::IntArrayRef(tensor.strides) << " " << tensor.dtype
             << " version " << tensor.version;
}

std::string digest_of(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cpu()) return {};
  const at::Tensor dense = tensor.detach().contiguous();
  return format::digest({static_cast<const std::byte*>(dense.const_data_ptr()), dense.nbytes()});
}

struct Enough {};  // thrown through the second run, when it has saved all that the first one did

// One call of recompute(): lives as long as a saved tensor of it.
class Layer {
 public:
  Layer(std::function<at::Tensor()> body, RecomputeHooks hooks) : body_(std::move(body)), hooks_(std::move(hooks)) {}

  at::Tensor first_run(Saver& saver) {
    const SaverScope scope(saver);
    at::Tensor output = body_();
    if (hooks_.is_checked) digest_ = digest_of(output);
    is_running_ = false;
    return output;
  }

  size_t pack(const at::Tensor& tensor) {
    saved_.push_back({Description(tensor), at::Tensor(), /*is_wanted=*/true});
    return saved_.size() - 1;
  }

  at::Tensor unpack(size_t index) {
    LOCKSTEP_CHECK(!is_running_) << "backward inside a layer that is to be recomputed";
    at::Tensor tensor = take(index);
    if (!tensor.defined()) {
      run_body_again();
      tensor = take(index);
    }
    LOCKSTEP_CHECK(tensor._version() == saved_[index].description.version)
        << "tensor " << index << " that a recomputed layer saves was changed in place after it was saved";
    return tensor;
  }

  // Autograd is done with it.
  void forget(size_t index) {
    at::Tensor last;  // freed outside the lock
    const std::lock_guard lock(mutex_);
    saved_[index].is_wanted = false;
    last = std::move(saved_[index].again);
  }

 private:
  friend class Recorder;
  struct Saved {
    Description description;
    at::Tensor again;  // of the second run, until it is handed out
    bool is_wanted;
  };

  at::Tensor take(size_t index) {
    const std::lock_guard lock(mutex_);
    return std::move(saved_[index].again);
  }
  void run_body_again();

  std::function<at::Tensor()> body_;
  RecomputeHooks hooks_;
  Environment environment_;
  std::string digest_;
  bool is_running_ = true;
  std::mutex mutex_;  // backward of one graph may run on several threads
  std::vector<Saved> saved_;
};

class FirstRunHooks : public SavedVariableHooks {
 public:
  explicit FirstRunHooks(std::shared_ptr<Layer> layer) : layer_(std::move(layer)) {}
  ~FirstRunHooks() override {
    if (is_packed_) layer_->forget(index_);
  }
  FirstRunHooks(const FirstRunHooks&) = delete;
  FirstRunHooks& operator=(const FirstRunHooks&) = delete;
  void call_pack_hook(const at::Tensor& tensor) override {
    if (is_parameter(tensor)) {
      parameter_ = tensor;
      return;
    }
    index_ = layer_->pack(tensor);
    is_packed_ = true;
  }
  at::Tensor call_unpack_hook() override { return is_packed_ ? layer_->unpack(index_) : parameter_; }

 private:
  std::shared_ptr<Layer> layer_;
  at::Tensor parameter_;
  size_t index_ = 0;
  bool is_packed_ = false;
};

class FirstRunSaver : public Saver {
 public:
  explicit FirstRunSaver(std::shared_ptr<Layer> layer) : layer_(std::move(layer)) {}
  std::unique_ptr<SavedVariableHooks> hooks() override { return std::make_unique<FirstRunHooks>(layer_); }

 private:
  std::shared_ptr<Layer> layer_;
};

// Takes down what the second run saves, in the order of the first.
class Recorder : public Saver {
 public:
  explicit Recorder(Layer& layer) : layer_(layer), again_(layer.saved_.size()), is_wanted_(layer.saved_.size()) {
    const std::lock_guard lock(layer.mutex_);
    for (size_t i = 0; i < again_.size(); ++i) is_wanted_[i] = layer.saved_[i].is_wanted;
  }
  std::unique_ptr<SavedVariableHooks> hooks() override;

  void record(const at::Tensor& tensor) {
    const size_t index = count_++;
    if (index >= again_.size()) return;  // counted
    const Description now(tensor);
    LOCKSTEP_CHECK(now == layer_.saved_[index].description)
        << "tensor " << index << " that a layer saves is " << now << " when it runs again and was "
        << layer_.saved_[index].description << ": a recomputed layer must do the same both times, on the same inputs";
    if (is_wanted_[index]) again_[index] = tensor.detach();
    if (count_ == again_.size() && !layer_.hooks_.is_checked) throw Enough();
  }

  void finish() {
    LOCKSTEP_CHECK(count_ == again_.size()) << "a layer saved " << again_.size() << " tensors and " << count_
                                            << " when it ran again: it must do the same both times";
    const std::lock_guard lock(layer_.mutex_);
    for (size_t i = 0; i < again_.size(); ++i) {
      if (layer_.saved_[i].is_wanted) layer_.saved_[i].again = std::move(again_[i]);
    }
  }

 private:
  Layer& layer_;
  std::vector<at::Tensor> again_;
  std::vector<bool> is_wanted_;
  size_t count_ = 0;
};

class SecondRunHooks : public SavedVariableHooks {
 public:
  explicit SecondRunHooks(Recorder& recorder) : recorder_(recorder) {}
  void call_pack_hook(const at::Tensor& tensor) override {
    if (!is_parameter(tensor)) recorder_.record(tensor);
  }
  at::Tensor call_unpack_hook() override {
    LOCKSTEP_CHECK(false) << "backward inside a layer that is recomputed";
    return {};
  }

 private:
  Recorder& recorder_;
};

std::unique_ptr<SavedVariableHooks> Recorder::hooks() { return std::make_unique<SecondRunHooks>(*this); }

void Layer::run_body_again() {
  Recorder recorder(*this);
  run_again(environment_, hooks_, [&] {
    const SaverScope scope(recorder);
    try {
      const at::Tensor output = body_();
      LOCKSTEP_CHECK(!hooks_.is_checked || digest_of(output) == digest_)
          << "a layer's output has other bits when it runs again: it draws random numbers without a key, reads what "
             "has changed, or its weights are not there";
    } catch (const Enough&) {
    }
  });
  recorder.finish();
}

}  // namespace

at::Tensor recompute_full(const std::function<at::Tensor()>& body, const RecomputeHooks& hooks) {
  const auto layer = std::make_shared<Layer>(body, hooks);
  FirstRunSaver saver(layer);
  return layer->first_run(saver);
}

}  // namespace lockstep
