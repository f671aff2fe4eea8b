// Store's reading half: which checkpoint, agreed by all ranks, and its bytes into this rank's boxes.
#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <thread>

#include <unistd.h>

#include <ATen/ops/empty_like.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/base/planted_bug.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>

#include "agree.h"
#include "node_reader.h"
#include "plan.h"
#include "save.h"
#include "tensor_bytes.h"

namespace lockstep::checkpoint {
namespace {

// Empty when the model's tensors (of the sections asked for) are all in the checkpoint, of the same dtype and shape.
std::string difference(const format::Manifest& manifest, const std::vector<const StateTensor*>& wanted) {
  std::string text;
  for (const StateTensor* tensor : wanted) {
    const ShardLayout& layout = tensor->layout;
    const auto found = manifest.tensors.find(format::tensor_key(tensor->section, layout.name));
    if (found == manifest.tensors.end()) {
      text += "\n  " + tensor->section + " " + layout.name + " is not in the checkpoint";
    } else if (found->second.shape != layout.shape || found->second.dtype != layout.dtype) {
      text += "\n  " + tensor->section + " " + layout.name + ": " + describe(found->second.dtype, found->second.shape) +
              " in the checkpoint, " + describe(layout.dtype, layout.shape) + " in the model";
    }
  }
  return text;
}

// A contiguous CPU tensor is read into in place. Collective over the node.
void read_tensors(const format::Reader& reader, const std::vector<const StateTensor*>& wanted, ProcessGroup& node,
                  const std::vector<int>& node_ranks, int threads, Milliseconds timeout) {
  NodeReader node_reader(reader, node, node_ranks, threads, timeout);
  std::vector<at::Tensor> host;
  for (const StateTensor* tensor : wanted) {
    const bool in_place = tensor->local.is_cpu() && tensor->local.is_contiguous();
    host.push_back(in_place ? tensor->local
                            : at::empty_like(tensor->local, at::TensorOptions(at::kCPU), at::MemoryFormat::Contiguous));
    if (is_planted(Plant::kLostOptimizerTensor) && tensor == wanted.back()) continue;
    node_reader.want(*tensor, bytes_of(host.back()));
  }
  node_reader.finish();
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (!host[i].is_same(wanted[i]->local)) wanted[i]->local.detach().copy_(host[i]);
  }
}

}  // namespace

// The ranks that share this machine's storage and memory.
ProcessGroup& Store::node() {
  if (node_) return *node_;
  std::array<char, 256> host{};
  ::gethostname(host.data(), host.size() - 1);
  const std::vector<std::string> hosts = all_gather_text(world_, host.data());
  for (int rank = 0; rank < world_.size(); ++rank) {
    if (hosts[rank] == hosts[world_.rank()]) node_ranks_.push_back(rank);
  }
  node_ = world_.split(node_ranks_.front(), world_.rank(), "node");
  return *node_;
}

// Where names of other machines show late, one that is not there now is no damage yet.
std::unique_ptr<format::Reader> Store::open_patiently(const std::string& path) const {
  using Clock = std::chrono::steady_clock;
  const Milliseconds patience = std::min(options_.late_names, options_.timeout / 2);
  const auto deadline = Clock::now() + patience;
  const format::Trust trust = options_.trust_foreign ? format::Trust::kAny : format::Trust::kOwn;
  for (Milliseconds pause(10);; pause = std::min(2 * pause, Milliseconds(2000))) {
    try {
      return std::make_unique<format::Reader>(fs_, path, trust);
    } catch (const IoError& error) {
      const bool may_come = error.error_number() == ENOENT || error.error_number() == ESTALE;
      if (!may_come || Clock::now() >= deadline || !fs_.shows_late(path)) throw;
      LOG_IF(WARNING, pause == Milliseconds(10))
          << error.what() << ": this file system may show late what other machines write; looking for it for up to "
          << static_cast<double>(patience.count()) / 1000 << " s";
    }
    std::this_thread::sleep_until(std::min(Clock::now() + pause, deadline));
  }
}

// Opened and compared first, on all ranks: the reading itself is work that they share.
Verdict Store::read(const std::string& path, const std::vector<StateTensor>& state, bool weights_only,
                    Progress& progress) {
  ProcessGroup& node_group = node();
  const std::string doing = "loading '" + path + "'";
  std::unique_ptr<format::Reader> reader;
  std::vector<const StateTensor*> wanted;
  for (const StateTensor& tensor : state) {
    if (!weights_only || format::is_weights_section(tensor.section)) wanted.push_back(&tensor);
  }
  Verdict opened = attempt(world_, doing, options_.timeout, [&] { reader = open_patiently(path); });
  if (opened.outcome != Outcome::kDone) return opened;
  const format::Manifest& manifest = reader->manifest();
  if (reader->is_foreign() && world_.rank() == 0) {
    LOG(WARNING) << "'" << path << "' belongs to " << reader->owner_name() << ": step " << manifest.step << ", epoch "
                 << manifest.epoch << ", SHA-256 of its MANIFEST " << reader->manifest_sha256();
  }
  if (const std::string text = difference(manifest, wanted); !text.empty()) {
    throw ConfigError("the model does not fit the checkpoint '" + path + "':" + text +
                      "\nMend: start with the flags it was trained with");
  }
  progress = {.step = manifest.step,
              .samples = manifest.samples,
              .config_json = manifest.config_json,
              .record_json = manifest.record_json,
              .data_fingerprint = manifest.data_fingerprint};
  return attempt(world_, doing, options_.timeout, [&] {
    read_tensors(*reader, wanted, node_group, node_ranks_, options_.read_threads, options_.timeout);
  });
}

// Paths a line each. Rank 0's view decides for all: listings of a network file system may differ between hosts.
std::string Store::list_newest_first(bool& any) {
  const std::string listing = on_chief(world_, options_.timeout, [&] {
    std::string text;
    const auto& durable = options_.known_durable;
    bool found = durable.lower_bound({options_.first_epoch, 0}) != durable.end();
    remove_retired(fs_, checkpoints());
    for (format::Candidate& candidate : format::list_candidates(fs_, checkpoints())) {
      // Without a manifest: left by a start that died. One that superseded us may still be writing; leave it alone.
      const bool is_lost = has_lost_manifest(candidate);
      if (is_lost && fs_.shows_late(candidate.path)) {
        candidate.complete = true;  // for all we know; whoever opens it is patient
      } else if (is_lost) {
        LOG(ERROR) << "'" << candidate.path << "' was durable and has lost its MANIFEST; it is passed by and kept";
      } else if (!candidate.complete && candidate.epoch <= options_.epoch) {
        remove_unfinished(fs_, candidate.path);
      }
      if (!candidate.complete || candidate.epoch < options_.first_epoch) continue;
      found = true;
      if (!candidate.quarantined) text += candidate.path + "\n";
    }
    return (found ? "+" : "-") + text;
  });
  any = listing[0] == '+';
  return listing.substr(1);
}

std::optional<Progress> Store::load_newest(const std::vector<StateTensor>& state) {
  check_state(state);
  bool any = false;
  const std::string listing = list_newest_first(any);
  if (!any) return std::nullopt;
  std::string reasons;
  for (size_t begin = 0; begin < listing.size();) {
    const size_t end = listing.find('\n', begin);
    const std::string path = listing.substr(begin, end - begin);
    begin = end + 1;
    Progress progress;
    const Verdict verdict = read(path, state, /*weights_only=*/false, progress);
    if (verdict.outcome == Outcome::kDone) {
      parent_step_ = progress.step;
      if (world_.rank() == 0) LOG(INFO) << "resuming from " << path;
      return progress;
    }
    if (verdict.outcome == Outcome::kBusy) throw Error(ExitCode::kStorage, verdict.reason);
    as_owner([] {});  // a newer start may have retired it meanwhile
    reasons += "\n  " + verdict.reason;
    if (world_.rank() == 0) {
      const bool damaged = verdict.outcome == Outcome::kCorrupt;
      LOG(ERROR) << "'" << path << "' " << (damaged ? "is damaged and put in quarantine" : "cannot be read")
                 << "; falling back to the checkpoint before it";
      if (damaged) {
        try_here("marking '" + path + "'",
                 [&] { fs_.create_exclusive(path + "/" + format::kQuarantineName, 0600)->close(); });
      }
    }
  }
  throw CorruptData(
      "no checkpoint in '" + checkpoints() + "' is good:" + reasons +
      (reasons.empty() ? "\n  those that were durable are gone, without their MANIFEST or in quarantine" : "") +
      "\nMend: look at them with lockstep verify (a file QUARANTINED in a good one may be removed); start "
      "over only on purpose, with --resume=never or another --run_dir");
}

Progress Store::load(const std::string& path, const std::vector<StateTensor>& state, bool weights_only) {
  check_state(state);
  const std::string resolved =
      on_chief(world_, options_.timeout, [&] { return format::resolve_checkpoint(fs_, path); });
  Progress progress;
  const Verdict verdict = read(resolved, state, weights_only, progress);
  if (verdict.outcome == Outcome::kCorrupt) throw CorruptData(verdict.reason);
  if (verdict.outcome != Outcome::kDone) throw Error(ExitCode::kStorage, verdict.reason);
  if (!weights_only) parent_step_ = progress.step;
  return progress;
}

}  // namespace lockstep::checkpoint
