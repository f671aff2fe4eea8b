// What hang_test.py starts as ranks. hanging_rank FAULT CULPRIT STEP FOLDER: steps of collectives on the world and on a
// group of every other rank; in the step of that number rank CULPRIT does
//   stop, spin, sleep, die, crash, leave   stops, computes for ever, sleeps for ever, SIGKILL, SIGSEGV, exits with 0
//   hold                                    begins a sum and sleeps instead of waiting for it
//   missing, swapped, circle                leaves a call out, swaps two of the world, swaps two of two groups
//   count, dtype, root                      calls with another one
// and leaves what it holds up in FOLDER/expect: "group sequence op". The fault "delays" sleeps at random, less than the
// timeout, for STEP seconds. T and BACKEND in the environment are the options.
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <random>
#include <thread>

#include <unistd.h>

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <lockstep/collectives/runtime.h>
#include <lockstep/flight/ring.h>

namespace {

using namespace lockstep;

constexpr int64_t kLarge = 1 << 21;  // in several rounds: nobody gets by with what came at first

class Steps {
 public:
  Steps(Runtime& runtime, std::string fault, int culprit, int last, std::string folder)
      : world_(runtime.world()),
        fault_(std::move(fault)),
        is_culprit_(runtime.info().rank == culprit),
        last_(last),
        folder_(std::move(folder)) {
    world_.flight_ring()->set_folder(folder_);
    // A busy machine may take seconds to get all ranks this far.
    world_.flight_ring()->set_phase(flight::Phase::kLoading);
    half_ = world_.split(runtime.info().rank % 2, 0, "half");
    sum(8);
    half();
    world_.flight_ring()->set_phase(flight::Phase::kTraining);
  }

  void run() {
    for (int step = 1; step < 100000; ++step) {
      world_.flight_ring()->set_step(step);
      std::this_thread::sleep_for(
          std::chrono::milliseconds(10));  // else the ring has forgotten the fault in the blink of an eye
      now_ = is_culprit_ && step == last_;
      const int64_t numel = fault_ == "hold" && step == last_ ? kLarge : 8;
      if (now_) before_the_sum();
      if (now_ && fault_ == "swapped") {
        expect("world", world_calls_ + 1, "all_reduce");
        gather();
        sum(numel);
      } else {
        sum(numel);
        if (now_ && fault_ == "missing") expect("world", world_calls_ + 1, "all_gather");
        if (!(now_ && fault_ == "missing")) gather();
      }
      if (now_ && fault_ == "circle") {
        expect("half", half_calls_ + 1, "all_reduce");
        root();
        half();
      } else {
        half();
        root();
      }
    }
  }

  void run_with_delays(int rank, double timeout_s, double seconds) {
    std::mt19937 random(static_cast<unsigned>(rank) * 77U + 1U);
    std::uniform_real_distribution<double> delay(0, 0.7 * timeout_s);
    at::Tensor is_over = at::zeros({1}, at::kInt);
    const auto start = std::chrono::steady_clock::now();
    while (is_over.item<int>() == 0) {
      std::this_thread::sleep_for(std::chrono::duration<double>(delay(random)));
      half();
      std::this_thread::sleep_for(std::chrono::duration<double>(delay(random) / 4));
      is_over.fill_(std::chrono::steady_clock::now() - start > std::chrono::duration<double>(seconds) ? 1 : 0);
      world_.all_reduce(is_over, ReduceOp::kMax).wait();
    }
    half_->close();
  }

 private:
  void expect(const std::string& group, int sequence, const std::string& op) const {
    std::ofstream(folder_ + "/expect.new") << group << " " << sequence << " " << op << std::endl;
    std::rename((folder_ + "/expect.new").c_str(), (folder_ + "/expect").c_str());
  }

  void before_the_sum() {
    if (fault_ == "missing" || fault_ == "swapped" || fault_ == "circle" || fault_ == "root") return;
    expect("world", world_calls_ + 1, "all_reduce");
    if (fault_ == "stop") ::raise(SIGSTOP);
    if (fault_ == "die") ::raise(SIGKILL);
    if (fault_ == "crash") ::raise(SIGSEGV);
    if (fault_ == "leave") ::_exit(0);
    if (fault_ == "sleep") std::this_thread::sleep_for(std::chrono::hours(1));
    for (std::atomic<int64_t> i = 0; fault_ == "spin"; ++i) {
    }
    if (fault_ == "hold") {
      const flight::LabelScope label(3, "block1.weight");
      at::Tensor x = at::ones({kLarge}, at::kFloat);
      Work work = world_.all_reduce(x);
      std::this_thread::sleep_for(std::chrono::hours(1));
      work.wait();
    }
  }

  void sum(int64_t numel) {
    const flight::LabelScope label(3, "block1.weight");
    if (now_ && fault_ == "count") numel -= 1;
    at::Tensor x = at::ones({numel}, now_ && fault_ == "dtype" ? at::kInt : at::kFloat);
    ++world_calls_;
    world_.all_reduce(x).wait();
  }
  void gather() {
    at::Tensor mine = at::ones({4}, at::kByte), all = at::zeros({int64_t{4} * world_.size()}, at::kByte);
    ++world_calls_;
    world_.all_gather(all, mine).wait();
  }
  void half() {
    at::Tensor x = at::ones({3}, at::kFloat);
    ++half_calls_;
    half_->all_reduce(x).wait();
  }
  void root() {
    at::Tensor x = at::ones({5}, at::kLong);
    if (now_ && fault_ == "root") expect("world", world_calls_ + 1, "broadcast");
    ++world_calls_;
    world_.broadcast(x, now_ && fault_ == "root" ? 1 : 0).wait();
  }

  ProcessGroup& world_;
  std::unique_ptr<ProcessGroup> half_;
  const std::string fault_;
  const bool is_culprit_;
  const int last_;
  const std::string folder_;
  bool now_ = false;
  int world_calls_ = 2, half_calls_ = 0;  // the start and the split were the world's first
};

std::string variable(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

}  // namespace

int main(int, char** argv) {
  const std::string fault = argv[1], folder = argv[4];
  const int culprit = std::atoi(argv[2]), last = std::atoi(argv[3]);
  const double timeout_s = std::atof(variable("T", "3").c_str());
  return run_rank({.device = "cpu", .backend = variable("BACKEND", "auto"), .hang_timeout_s = timeout_s},
                  [&](Runtime& runtime) {
                    std::ofstream(folder + "/pid." + std::to_string(runtime.info().rank)) << getpid() << std::endl;
                    Steps steps(runtime, fault, culprit, last, folder);
                    if (fault == "delays") {
                      steps.run_with_delays(runtime.info().rank, timeout_s, last);
                    } else {
                      steps.run();
                    }
                    return 0;
                  });
}
