// Store::save: the order of its calls is the promise that a durable checkpoint survives anything (README.md).
#include "save.h"

#include <cerrno>
#include <chrono>
#include <map>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/writer.h>

#include "agree.h"
#include "plan.h"
#include "tensor_bytes.h"

namespace lockstep::checkpoint {
namespace {

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
  check_state(state);
  const auto start = std::chrono::steady_clock::now();
  const std::string directory = checkpoints() + "/" + format::directory_name(progress.step, options_.epoch);
  const std::string doing = "saving step " + std::to_string(progress.step);
  const bool chief = world_.rank() == 0;
  const auto all = [&](const auto& work) { return attempt(world_, doing, options_.timeout, work); };

  Verdict verdict = all([&] {
    if (chief) prepare(directory);
  });
  if (verdict.outcome == Outcome::kDone) {
    verdict = all([&] { write_own_shard(directory, state); });
    if (verdict.outcome == Outcome::kDone) {
      verdict = all([&] {
        if (chief) commit(directory, progress, state);
      });
    }
    if (verdict.outcome != Outcome::kDone) abandon(directory, doing);
  }
  if (verdict.outcome == Outcome::kFenced) throw Fenced(verdict.reason);
  if (verdict.outcome != Outcome::kDone) return false;
  options_.known_durable.insert(format::directory_name(progress.step, options_.epoch));
  last_save_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (chief) try_here("removing old checkpoints", [&] { retire_old(); });
  return true;
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
  try {
    fs_.sync_directory(checkpoints());
  } catch (const IoError&) {
    try_here("cleaning up", [&] { fs_.remove_directory(directory); });
    throw;
  }
}

void Store::write_own_shard(const std::string& directory, const std::vector<StateTensor>& state) {
  std::vector<format::BoxToWrite> boxes;
  std::vector<at::Tensor> host;  // keeps copies of GPU tensors alive; a contiguous CPU tensor is written from in place
  for (const PlannedBox& planned : plan_boxes(state, world_.size())) {
    if (planned.owner != world_.rank()) continue;
    const StateTensor& tensor = state[planned.tensor];
    host.push_back(tensor.local.cpu().contiguous());
    boxes.push_back({format::tensor_key(tensor.section, tensor.layout.name), tensor.layout.dtype, planned.box,
                     bytes_of(host.back())});
  }
  if (boxes.empty()) return;
  format::write_shard(fs_, directory + "/" + format::shard_name(world_.rank(), world_.size()), boxes);
  fs_.sync_directory(directory);
}

void Store::commit(const std::string& directory, const Progress& progress, const std::vector<StateTensor>& state) {
  format::Manifest manifest{.step = progress.step,
                            .epoch = options_.epoch,
                            .samples = progress.samples,
                            .world_size = world_.size(),
                            .parent_step = parent_step_,
                            .config_json = progress.config_json,
                            .record_json = progress.record_json,
                            .data_fingerprint = progress.data_fingerprint};
  std::map<int, size_t> file_of_rank;
  for (const PlannedBox& planned : plan_boxes(state, world_.size())) {
    const StateTensor& tensor = state[planned.tensor];
    const auto [place, is_new] = file_of_rank.try_emplace(planned.owner, manifest.files.size());
    if (is_new) {
      // Opened afresh, so that on NFS we see what the other host's close has published.
      const std::string name = format::shard_name(planned.owner, world_.size());
      manifest.files.push_back(format::describe_shard(fs_, directory, name));
    }
    auto& stored = manifest.tensors[format::tensor_key(tensor.section, tensor.layout.name)];
    stored.dtype = tensor.layout.dtype;
    stored.shape = tensor.layout.shape;
    stored.boxes.push_back({planned.box, place->second});
  }
  for (const StateTensor& tensor : state) {  // those without elements are in no plan, and part of the state
    manifest.tensors.try_emplace(format::tensor_key(tensor.section, tensor.layout.name),
                                 format::StoredTensor{tensor.layout.dtype, tensor.layout.shape, {}});
  }
  check_not_fenced();
  const std::string path = directory + "/" + format::kManifestName, aside = path + ".tmp";
  write_durable(fs_, aside, format::encode_manifest(manifest));
  fs_.rename_exclusive(aside, path);
  fs_.sync_directory(directory);
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
  return !candidate.complete &&
         options_.known_durable.contains(format::directory_name(candidate.step, candidate.epoch));
}

// Only what is older than keep_last good ones goes, under another name first: a manifest that is missing under the own
// one was not taken away by us. Unfinished folders are failed attempts whose cleaning failed too.
void Store::retire_old() {
  int64_t kept = 0;
  for (const format::Candidate& candidate : format::list_candidates(fs_, checkpoints())) {
    if (candidate.epoch > options_.epoch || (candidate.complete && candidate.quarantined)) continue;
    if (has_lost_manifest(candidate) || (candidate.complete && ++kept <= options_.keep_last)) continue;
    fs_.rename_exclusive(candidate.path, candidate.path + format::kRetiredSuffix);
    fs_.sync_directory(checkpoints());
  }
  remove_retired(fs_, checkpoints());
}

}  // namespace lockstep::checkpoint
