// Store::save: the order of its calls is the promise that a durable checkpoint survives anything (README.md).
#include "save.h"

#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>

#include <ATen/ops/from_blob.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/writer.h>

#include "agree.h"
#include "plan.h"
#include "staging.h"
#include "tensor_bytes.h"

namespace lockstep::checkpoint {
namespace {

using Clock = std::chrono::steady_clock;

void remove_folder(Fs& fs, const std::string& directory) {
  // The manifest first, and durably: no moment, not even after a power loss, shows a manifest without its shards.
  if (const std::string manifest = directory + "/" + format::kManifestName; fs.exists(manifest)) {
    fs.remove_file(manifest);
    fs.sync_directory(directory);
  }
  const std::string prefix = directory + "/";
  for (const std::string& name : fs.list_directory(directory)) fs.remove_file(prefix + name);
  fs.remove_directory(directory);
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// `work` on a thread of its own, or on the one that asks for the result.
template <typename Work>
std::future<void> start_part(std::launch how, double& storage_seconds, Work work) {
  return std::async(how, [&storage_seconds, work] {
    const auto start = Clock::now();
    work();
    storage_seconds += seconds_since(start);
  });
}

size_t staged_bytes(const at::Tensor& tensor) { return (tensor.nbytes() + 63) / 64 * 64; }

void copy_bytes(const at::Tensor& from, std::span<std::byte> to) {
  if (from.is_cpu() && from.is_contiguous()) {
    std::memcpy(to.data(), from.const_data_ptr(), to.size());
  } else {
    at::from_blob(to.data(), from.sizes(), from.options().device(at::kCPU)).copy_(from);
  }
}

}  // namespace

void remove_unfinished(Fs& fs, const std::string& directory) {
  LOG(WARNING) << "'" << directory << "' was never finished; removing it";
  try_here("removing '" + directory + "'", [&] { remove_folder(fs, directory); });
}

void remove_retired(Fs& fs, const std::string& checkpoints) {
  if (!fs.exists(checkpoints)) return;
  const std::string prefix = checkpoints + "/";
  for (const std::string& name : fs.list_directory(checkpoints)) {
    if (name.ends_with(format::kRetiredSuffix))
      try_here("removing a retired checkpoint", [&] { remove_folder(fs, prefix + name); });
  }
}

bool Store::save(const Progress& progress, const std::vector<StateTensor>& state) {
  if (!begin(progress, state, std::launch::deferred)) return false;
  std::optional<SaveResult> result;
  while (!result) result = advance_save();
  return result->durable;
}

bool Store::start_save(const Progress& progress, const std::vector<StateTensor>& state) {
  return begin(progress, state, std::launch::async);
}

bool Store::begin(const Progress& progress, const std::vector<StateTensor>& state, std::launch how) {
  LOCKSTEP_CHECK(!save_) << "step " << progress.step << " is to be saved while another save is under way";
  const auto start = Clock::now();
  check_state(state);
  if (upkeep_.valid()) upkeep_.get();
  auto save = std::make_unique<Save>();
  save->how = how;
  save->progress = progress;
  save->state = state;
  save->plan = plan_boxes(state, world_.size());
  if (options_.check_plan) check_same_plan(world_, state, save->plan);
  save->directory = checkpoints() + "/" + format::directory_name(progress.step, options_.epoch);
  save->doing = "saving step " + std::to_string(progress.step);
  const Verdict verdict = attempt(world_, save->doing, options_.timeout, [&] {
    if (world_.rank() == 0) prepare(save->directory);
  });
  if (verdict.outcome == Outcome::kFenced) throw Fenced(verdict.reason);
  if (verdict.outcome != Outcome::kDone) return false;
  take_boxes(*save);
  save->start = start;
  save->part = start_part(how, save->storage_seconds, [this, save = save.get()] { write_own_shard(*save); });
  save->stall_seconds = seconds_since(start);
  save_ = std::move(save);
  return true;
}

bool Store::is_writing() {
  if (!save_ || save_->part.wait_for(std::chrono::seconds(0)) != std::future_status::timeout) return false;
  const double seconds = seconds_since(save_->start);
  if (!save_->is_slow && seconds > std::chrono::duration<double>(options_.slow_after).count()) {
    save_->is_slow = true;
    const auto bytes = static_cast<double>(save_->written_bytes);
    LOG(WARNING) << save_->doing << ": storage is slow, " << bytes << " bytes in " << seconds << " s ("
                 << bytes / seconds << " bytes/s) here so far";
  }
  return true;
}

std::optional<SaveResult> Store::advance_save() {
  LOCKSTEP_CHECK(save_) << "no save is under way";
  const auto start = Clock::now();
  Verdict verdict = attempt(world_, save_->doing, options_.timeout, [&] { save_->part.get(); });
  const bool chief = world_.rank() == 0;
  if (verdict.outcome == Outcome::kDone && !save_->has_shards) {
    save_->has_shards = true;
    if (options_.sha256) save_->all_sha256 = all_gather_text(world_, save_->sha256);
    save_->part = start_part(chief ? save_->how : std::launch::deferred, save_->storage_seconds,
                             [this, chief, save = save_.get()] {
                               if (chief) commit(*save);
                             });
    save_->stall_seconds += seconds_since(start);
    return std::nullopt;
  }
  const std::unique_ptr<Save> save = std::move(save_);
  if (verdict.outcome != Outcome::kDone) abandon(save->directory, save->doing);
  if (verdict.outcome == Outcome::kFenced) throw Fenced(verdict.reason);
  last_save_ = {.step = save->progress.step,
                .durable = verdict.outcome == Outcome::kDone,
                .seconds = seconds_since(save->start),
                .stall_seconds = save->stall_seconds + seconds_since(start),
                .storage_seconds = save->storage_seconds};
  if (!last_save_.durable) return last_save_;
  options_.known_durable.emplace(options_.epoch, save->progress.step);
  if (chief) {
    upkeep_ = std::async(save->how, [this] { try_here("removing old checkpoints", [this] { retire_old(); }); });
    if (save->how == std::launch::deferred) upkeep_.get();
  }
  return last_save_;
}

void Store::prepare(const std::string& directory) {
  check_not_fenced();
  make_directories(fs_, checkpoints());
  if (fs_.exists(directory)) {
    if (fs_.exists(directory + "/" + format::kManifestName))
      throw IoError("saving again what is saved already,", directory, EEXIST);
    remove_folder(fs_, directory);  // an earlier attempt of ours: the epoch is in the name
  }
  fs_.make_directory(directory);
}

void Store::reserve(const std::vector<StateTensor>& state) {
  size_t bytes = 0;
  for (const PlannedBox& planned : plan_boxes(state, world_.size()))
    if (planned.owner == world_.rank()) bytes += staged_bytes(state[planned.tensor].local);
  if (!staging_) staging_ = std::make_unique<Staging>();
  upkeep_ = std::async(std::launch::async, [this, bytes] {
    try {
      staging_->reserve(bytes);
    } catch (const ConfigError& error) {  // ends the save that needs it, if one comes
      LOG(WARNING) << error.what();
    }
  });
}

// What this rank writes: in the background a copy, as the tensors go on changing; else their own memory.
void Store::take_boxes(Save& save) {
  std::vector<size_t> own;  // indices into the state
  size_t bytes = 0;
  for (const PlannedBox& planned : save.plan) {
    if (planned.owner != world_.rank()) continue;
    own.push_back(planned.tensor);
    const StateTensor& tensor = save.state[planned.tensor];
    save.boxes.push_back(
        {format::tensor_key(tensor.section, tensor.layout.name), tensor.layout.dtype, planned.box, {}});
    bytes += staged_bytes(tensor.local);
  }
  if (save.how == std::launch::deferred) {
    for (size_t i = 0; i < own.size(); ++i) {
      save.host.push_back(save.state[own[i]].local.cpu().contiguous());
      save.boxes[i].bytes = bytes_of(save.host.back());
    }
    return;
  }
  if (!staging_) staging_ = std::make_unique<Staging>();
  std::span<std::byte> room = staging_->reserve(bytes);
  for (size_t i = 0; i < own.size(); ++i) {
    const at::Tensor& local = save.state[own[i]].local;
    save.boxes[i].bytes = room.first(local.nbytes());
    copy_bytes(local, room.first(local.nbytes()));
    room = room.subspan(staged_bytes(local));
  }
  for (StateTensor& tensor : save.state) tensor.local = at::Tensor();  // what is left of them is the layouts
}

void Store::write_own_shard(Save& save) {
  if (world_.rank() == 0) fs_.sync_directory(checkpoints());
  if (save.boxes.empty()) return;
  format::write_shard(
      fs_, save.directory + "/" + format::shard_name(world_.rank(), world_.size()), save.boxes,
      [&](uint64_t done, uint64_t) { save.written_bytes = done; }, options_.sha256 ? &save.sha256 : nullptr);
  fs_.sync_directory(save.directory);
}

void Store::commit(const Save& save) {
  const Progress& progress = save.progress;
  format::Manifest manifest{.step = progress.step,
                            .epoch = options_.epoch,
                            .samples = progress.samples,
                            .world_size = world_.size(),
                            .parent_step = parent_step_,
                            .config_json = progress.config_json,
                            .record_json = progress.record_json,
                            .data_fingerprint = progress.data_fingerprint};
  std::map<int, size_t> file_of_rank;
  for (const PlannedBox& planned : save.plan) {
    const StateTensor& tensor = save.state[planned.tensor];
    const auto [place, is_new] = file_of_rank.try_emplace(planned.owner, manifest.files.size());
    if (is_new) {
      // Opened afresh, so that on NFS we see what the other host's close has published.
      const std::string name = format::shard_name(planned.owner, world_.size());
      manifest.files.push_back(format::describe_shard(fs_, save.directory, name));
      if (options_.sha256) manifest.files.back().sha256 = save.all_sha256[planned.owner];
    }
    auto& stored = manifest.tensors[format::tensor_key(tensor.section, tensor.layout.name)];
    stored.dtype = tensor.layout.dtype;
    stored.shape = tensor.layout.shape;
    stored.boxes.push_back({planned.box, place->second});
  }
  for (const StateTensor& tensor : save.state) {  // those without elements are in no plan, and part of the state
    manifest.tensors.try_emplace(format::tensor_key(tensor.section, tensor.layout.name),
                                 format::StoredTensor{tensor.layout.dtype, tensor.layout.shape, {}});
  }
  check_not_fenced();
  const std::string path = save.directory + "/" + format::kManifestName, aside = path + ".tmp";
  write_durable(fs_, aside, format::encode_manifest(manifest));
  fs_.rename_exclusive(aside, path);
  fs_.sync_directory(save.directory);
  fs_.sync_directory(checkpoints());
  // Once more: a start that came in between may have seen an unfinished folder and be removing it. One that comes later
  // sees the manifest.
  check_not_fenced();
}

// Each rank takes away what it wrote. The manifest goes first, durably; a folder without one is no checkpoint.
void Store::abandon(const std::string& directory, const std::string& doing) {
  const bool chief = world_.rank() == 0;
  const std::string manifest = directory + "/" + format::kManifestName;
  const auto clean = [&](const auto& work) { try_here(doing + ": cleaning up", work); };
  if (chief) {
    clean([&] {
      fs_.remove_file(manifest + ".tmp");
      if (!fs_.exists(manifest)) return;
      fs_.remove_file(manifest);
      fs_.sync_directory(directory);
    });
  }
  world_.barrier(options_.timeout);
  clean([&] { fs_.remove_file(directory + "/" + format::shard_name(world_.rank(), world_.size())); });
  world_.barrier(options_.timeout);
  if (chief) clean([&] { fs_.remove_directory(directory); });
}

bool Store::has_lost_manifest(const format::Candidate& candidate) const {
  return !candidate.complete && options_.known_durable.contains({candidate.epoch, candidate.step});
}

// Only what is older than keep_last good ones goes (keep_every_steps aside), under another name first: a manifest that
// is missing under the own one was not taken away by us. Unfinished folders are failed attempts whose cleaning failed
// too.
void Store::retire_old() {
  int64_t kept = 0;
  for (const format::Candidate& candidate : format::list_candidates(fs_, checkpoints())) {
    if (candidate.epoch > options_.epoch || (candidate.complete && candidate.quarantined)) continue;
    if (has_lost_manifest(candidate) || (candidate.complete && ++kept <= options_.keep_last)) continue;
    if (candidate.complete && options_.keep_every_steps > 0 && candidate.step % options_.keep_every_steps == 0)
      continue;
    fs_.rename_exclusive(candidate.path, candidate.path + format::kRetiredSuffix);
    fs_.sync_directory(checkpoints());
  }
  remove_retired(fs_, checkpoints());
}

}  // namespace lockstep::checkpoint
