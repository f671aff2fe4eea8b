#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include <lockstep/base/error.h>
#include <lockstep/data/global_order.h>
#include <lockstep/data/loader.h>

namespace lockstep::data {

// One thread fills a short queue of steps. Order is in the step number alone, so the queue is never state.
class TrainingLoader::Impl {
 public:
  Impl(std::shared_ptr<const Dataset> dataset, LoaderOptions options)
      : dataset_(std::move(dataset)),
        options_(checked(std::move(options))),
        order_(dataset_->size(), options.seed),
        step_(options.first_step),
        thread_([this] { fill(); }) {}

  static LoaderOptions checked(LoaderOptions options) {
    LOCKSTEP_CHECK(options.micro_batch_size > 0 && options.prefetch_steps > 0 && options.first_step >= 0)
        << options.micro_batch_size << " samples a micro-batch, " << options.prefetch_steps << " steps ahead";
    for (const int64_t leaf : options.leaves)
      LOCKSTEP_CHECK(leaf >= 0 && leaf < options.num_leaves) << "leaf " << leaf << " of " << options.num_leaves;
    return options;
  }

  ~Impl() {
    {
      const std::lock_guard lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  std::vector<Batch> next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !ready_.empty() || error_; });
    if (ready_.empty()) std::rethrow_exception(error_);
    std::vector<Batch> batches = std::move(ready_.front());
    ready_.pop_front();
    lock.unlock();
    changed_.notify_all();
    return batches;
  }

 private:
  void fill() {
    try {
      for (;;) {
        std::vector<Batch> batches = make_step(step_++);
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return closing_ || static_cast<int64_t>(ready_.size()) < options_.prefetch_steps; });
        if (closing_) return;
        ready_.push_back(std::move(batches));
        lock.unlock();
        changed_.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
    }
    changed_.notify_all();
  }

  std::vector<Batch> make_step(int64_t step) const {
    std::vector<Batch> batches;
    std::vector<int64_t> indices(options_.micro_batch_size);
    for (const int64_t leaf : options_.leaves) {
      const int64_t first = (step * options_.num_leaves + leaf) * options_.micro_batch_size;
      for (int64_t i = 0; i < options_.micro_batch_size; ++i) indices[i] = order_.sample_at(first + i);
      batches.push_back(dataset_->get(indices));
      if (options_.pin_memory) {
        for (auto& tensor : batches.back().tensors) tensor = tensor.pin_memory();
      }
    }
    return batches;
  }

  std::shared_ptr<const Dataset> dataset_;
  LoaderOptions options_;
  GlobalOrder order_;
  int64_t step_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::vector<Batch>> ready_;
  std::exception_ptr error_;
  bool closing_ = false;
  std::thread thread_;  // last: it uses all of the above
};

TrainingLoader::TrainingLoader(std::shared_ptr<const Dataset> dataset, LoaderOptions options)
    : impl_(std::make_unique<Impl>(std::move(dataset), std::move(options))) {}
TrainingLoader::~TrainingLoader() = default;
std::vector<Batch> TrainingLoader::next() { return impl_->next(); }

EvaluationPass::EvaluationPass(std::shared_ptr<const Dataset> dataset, int64_t micro_batch_size, int64_t max_samples)
    : dataset_(std::move(dataset)),
      micro_batch_size_(micro_batch_size),
      samples_(max_samples < 0 ? dataset_->size() : std::min(max_samples, dataset_->size())) {}

int64_t EvaluationPass::num_micro_batches() const { return (samples_ + micro_batch_size_ - 1) / micro_batch_size_; }

Batch EvaluationPass::get(int64_t index) const {
  LOCKSTEP_CHECK(index >= 0 && index < num_micro_batches()) << "micro-batch " << index << " of " << num_micro_batches();
  std::vector<int64_t> indices;
  for (int64_t i = index * micro_batch_size_; i < std::min(samples_, (index + 1) * micro_batch_size_); ++i)
    indices.push_back(i);
  const auto valid = static_cast<int64_t>(indices.size());
  indices.resize(micro_batch_size_, indices.back());  // one shape for all, so that the arithmetic is one too
  Batch batch = dataset_->get(indices);
  batch.valid_samples = valid;
  return batch;
}

}  // namespace lockstep::data
