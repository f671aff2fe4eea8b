#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/as_strided.h>

#include <lockstep/base/error.h>
#include <lockstep/nn/remake.h>

#include "saver.h"

namespace lockstep {
namespace {

using torch::autograd::SavedVariableHooks;

class Remake;

// A tensor for later: itself, or a view of one that can be made again.
class Later {
 public:
  explicit Later(const at::Tensor& tensor)
      : kept_(is_parameter(tensor) ? tensor : tensor.detach()), version_(tensor._version()) {}
  Later(const at::Tensor& tensor, std::shared_ptr<Remake> source);

  at::Tensor get() const;

 private:
  at::Tensor kept_;
  int64_t version_ = 0;
  std::shared_ptr<Remake> source_;
  std::vector<int64_t> sizes_, strides_;
  int64_t offset_ = 0;
};

// How one output is made: once, for all that ask. Gone with the last of them, which is soon: autograd drops what an
// operation saved when it is done with it.
class Remake {
 public:
  Remake(std::vector<std::unique_ptr<Later>> inputs, nn::RemakeListener::Make make, const at::Tensor& output,
         std::shared_ptr<const RecomputeHooks> hooks)
      : dtype(output.scalar_type()),
        inputs_(std::move(inputs)),
        make_(std::move(make)),
        nbytes_(output.storage().nbytes()),
        hooks_(std::move(hooks)) {}

  const at::Tensor& get() {
    const std::lock_guard lock(mutex_);
    if (!made_.defined()) made_ = make();
    return made_;
  }

  const at::ScalarType dtype;

 private:
  at::Tensor make() {
    std::vector<at::Tensor> inputs;
    for (const auto& input : inputs_) inputs.push_back(input->get());
    at::Tensor output;
    run_again(environment_, *hooks_, [&] {
      const at::NoGradGuard no_grad;
      output = make_(inputs);
    });
    LOCKSTEP_CHECK(output.scalar_type() == dtype && output.storage().nbytes() == nbytes_)
        << "an output made again is " << output.storage().nbytes() << " bytes of " << output.scalar_type()
        << " and was " << nbytes_ << " of " << dtype;
    return output;
  }

  std::vector<std::unique_ptr<Later>> inputs_;
  nn::RemakeListener::Make make_;
  size_t nbytes_;
  std::shared_ptr<const RecomputeHooks> hooks_;
  Environment environment_;
  std::mutex mutex_;
  at::Tensor made_;
};

Later::Later(const at::Tensor& tensor, std::shared_ptr<Remake> source)
    : source_(std::move(source)),
      sizes_(tensor.sizes().vec()),
      strides_(tensor.strides().vec()),
      offset_(tensor.storage_offset()) {}

at::Tensor Later::get() const {
  if (source_) {
    const at::NoGradGuard no_grad;
    return source_->get().as_strided(sizes_, strides_, offset_);
  }
  LOCKSTEP_CHECK(kept_._version() == version_)
      << "a tensor of " << kept_.sizes() << " saved for backward was changed in place: version " << version_
      << " then, " << kept_._version() << " now";
  return kept_;
}

class SelectiveHooks;

class SelectiveSaver : public Saver, public nn::RemakeListener {
 public:
  explicit SelectiveSaver(const RecomputeHooks& hooks) : hooks_(std::make_shared<RecomputeHooks>(hooks)) {}

  std::unique_ptr<SavedVariableHooks> hooks() override;

  void made(const at::Tensor& output, const std::vector<at::Tensor>& inputs, Make make) override {
    std::vector<std::unique_ptr<Later>> kept;
    kept.reserve(inputs.size());
    for (const auto& input : inputs) kept.push_back(later(input));
    sources_.insert_or_assign(output.storage().unsafeGetStorageImpl(),
                              Source{output.storage().getWeakStorageImpl(), output._version(),
                                     std::make_shared<Remake>(std::move(kept), std::move(make), output, hooks_)});
  }

  std::unique_ptr<Later> later(const at::Tensor& tensor) const {
    const auto found = tensor.has_storage() ? sources_.find(tensor.storage().unsafeGetStorageImpl()) : sources_.end();
    // A changed output is not what its function made.
    if (found == sources_.end() || found->second.version != tensor._version() ||
        found->second.remake->dtype != tensor.scalar_type()) {
      return std::make_unique<Later>(tensor);
    }
    return std::make_unique<Later>(tensor, found->second.remake);
  }

 private:
  struct Source {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;  // so that nothing else gets the address
    int64_t version;
    std::shared_ptr<Remake> remake;
  };
  std::shared_ptr<const RecomputeHooks> hooks_;
  std::unordered_map<const c10::StorageImpl*, Source> sources_;
};

class SelectiveHooks : public SavedVariableHooks {
 public:
  explicit SelectiveHooks(const SelectiveSaver& saver) : saver_(&saver) {}
  void call_pack_hook(const at::Tensor& tensor) override {
    later_ = saver_->later(tensor);
    saver_ = nullptr;  // it ends with the layer's forward
  }
  at::Tensor call_unpack_hook() override { return later_->get(); }

 private:
  const SelectiveSaver* saver_;
  std::unique_ptr<Later> later_;
};

std::unique_ptr<SavedVariableHooks> SelectiveSaver::hooks() { return std::make_unique<SelectiveHooks>(*this); }

}  // namespace

at::Tensor recompute_selective(const std::function<at::Tensor()>& body, const RecomputeHooks& hooks) {
  SelectiveSaver saver(hooks);
  const SaverScope scope(saver);
  const nn::RemakeScope listen(&saver);
  return body();
}

}  // namespace lockstep
