#include <algorithm>
#include <chrono>

#include <ATen/ops/empty_like.h>

#include <lockstep/base/error.h>
#include <lockstep/base/log.h>
#include <lockstep/checkpoint/checkpoint.h>
#include <lockstep/format/checksum.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/reader.h>
#include <lockstep/format/writer.h>

#include "epoch.h"
#include "plan.h"

namespace lockstep::checkpoint {
namespace {

std::span<std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

// Runs `work` and turns a storage failure into false, logged on this rank; other errors pass.
template <typename Work>
bool succeeds(const std::string& doing, Work work) {
  try {
    work();
    return true;
  } catch (const IoError& error) {
    LOG(ERROR) << doing << " failed: " << error.what();
  } catch (const CorruptData& error) {
    LOG(ERROR) << doing << " failed: " << error.what();
  }
  return false;
}

}  // namespace

std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return "F64";
    case at::kFloat:
      return "F32";
    case at::kHalf:
      return "F16";
    case at::kBFloat16:
      return "BF16";
    case at::kLong:
      return "I64";
    case at::kInt:
      return "I32";
    case at::kShort:
      return "I16";
    case at::kChar:
      return "I8";
    case at::kByte:
      return "U8";
    case at::kBool:
      return "BOOL";
    default:
      throw CheckFailed(std::string("dtype ") + at::toString(type) + " cannot be stored in a checkpoint");
  }
}

Store::Store(Fs& fs, ProcessGroup& world, Options options) : fs_(fs), world_(world), options_(std::move(options)) {
  LOCKSTEP_CHECK(options_.keep_last >= 2)
      << "keep_last is " << options_.keep_last << "; 2 is the least: one to fall back to";
}

void Store::check_not_fenced() {
  const uint64_t newest = newest_epoch(fs_, options_.run_dir);
  if (newest > options_.epoch) {
    throw Fenced("epoch " + std::to_string(newest) + " has taken over " + options_.run_dir +
                 " from this start (epoch " + std::to_string(options_.epoch) + ")");
  }
}

bool Store::save(const Progress& progress, const std::vector<StateTensor>& state) {
  const auto start = std::chrono::steady_clock::now();
  const std::string directory = checkpoints() + "/" + format::directory_name(progress.step, options_.epoch);
  const std::string doing = "saving step " + std::to_string(progress.step);
  const bool chief = world_.rank() == 0;
  bool made = true;
  if (chief) {
    made = succeeds(doing, [&] {
      check_not_fenced();
      fs_.make_directory(directory);
      fs_.sync_directory(checkpoints());
    });
  }
  if (!all_agree(world_, made)) return false;
  const bool wrote = succeeds(doing, [&] { write_own_shard(directory, state); });
  bool durable = all_agree(world_, wrote);
  if (durable) {
    bool committed = true;
    if (chief) committed = succeeds(doing, [&] { commit(directory, progress, state); });
    durable = all_agree(world_, committed);
  }
  if (!durable) {
    abandon(directory);
    return false;
  }
  last_save_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (chief) succeeds("removing old checkpoints", [&] { retire_old(); });
  return true;
}

void Store::write_own_shard(const std::string& directory, const std::vector<StateTensor>& state) {
  std::vector<format::BoxToWrite> boxes;
  std::vector<at::Tensor> host;  // keeps copies of GPU tensors alive
  for (const PlannedBox& planned : plan_boxes(state, world_.size())) {
    if (planned.owner != world_.rank()) continue;
    const StateTensor& tensor = state[planned.tensor];
    host.push_back(tensor.local.cpu().contiguous());
    boxes.push_back({format::tensor_key(tensor.section, tensor.layout.name), tensor.layout.dtype, planned.box,
                     bytes_of(host.back())});
  }
  if (!boxes.empty())
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
  std::vector<size_t> file_of_rank(world_.size(), 0);
  for (const PlannedBox& planned : plan_boxes(state, world_.size())) {
    const StateTensor& tensor = state[planned.tensor];
    const std::string name = format::shard_name(planned.owner, world_.size());
    auto found =
        std::find_if(manifest.files.begin(), manifest.files.end(), [&](const auto& file) { return file.name == name; });
    if (found == manifest.files.end()) {
      // Opened afresh, so that on NFS we see what the other host's close has published.
      const auto file = fs_.open_read(directory + "/" + name);
      const format::TensorHeader header = format::read_header(*file, directory + "/" + name);
      std::vector<std::byte> head(header.data_start);
      file->read_at(0, head);
      manifest.files.push_back({name, file->size(), format::crc32c(head)});
      found = manifest.files.end() - 1;
    }
    auto& stored = manifest.tensors[format::tensor_key(tensor.section, tensor.layout.name)];
    stored.dtype = tensor.layout.dtype;
    stored.shape = tensor.layout.shape;
    stored.boxes.push_back({planned.box, static_cast<size_t>(found - manifest.files.begin())});
  }
  check_not_fenced();
  const std::string path = directory + "/" + format::kManifestName;
  write_durable(fs_, path + ".tmp", format::encode_manifest(manifest));
  fs_.rename_exclusive(path + ".tmp", path);
  fs_.sync_directory(directory);
  fs_.sync_directory(checkpoints());
}

// Each rank takes away what it wrote; the manifest goes first, so that no moment shows half a checkpoint.
void Store::abandon(const std::string& directory) {
  const bool chief = world_.rank() == 0;
  const std::string manifest = directory + "/" + format::kManifestName;
  const auto remove = [&](const std::string& path) {
    succeeds("cleaning up after a failed save", [&] { fs_.remove_file(path); });
  };
  if (chief) {
    remove(manifest);
    remove(manifest + ".tmp");
  }
  world_.barrier();
  remove(directory + "/" + format::shard_name(world_.rank(), world_.size()));
  world_.barrier();
  if (chief) succeeds("cleaning up after a failed save", [&] { fs_.remove_directory(directory); });
}

// Only what is older than keep_last good ones goes: manifest first, made durable, then the shards.
void Store::retire_old() {
  int64_t kept = 0;
  for (const format::Candidate& candidate : format::list_candidates(fs_, checkpoints())) {
    if (!candidate.complete || candidate.quarantined || candidate.epoch > options_.epoch ||
        ++kept <= options_.keep_last)
      continue;
    fs_.remove_file(candidate.path + "/" + format::kManifestName);
    fs_.sync_directory(candidate.path);
    remove_leftover(fs_, candidate.path);
  }
}

void Store::read_into(const std::string& path, const std::vector<StateTensor>& state, bool weights_only,
                      Progress& progress) {
  const format::Reader reader(fs_, path);
  const format::Manifest& manifest = reader.manifest();
  std::string difference;
  for (const StateTensor& tensor : state) {
    if (weights_only && tensor.section != "weights") continue;
    const auto found = manifest.tensors.find(format::tensor_key(tensor.section, tensor.layout.name));
    if (found == manifest.tensors.end()) {
      difference += "\n  " + tensor.section + " " + tensor.layout.name + " is not in the checkpoint";
    } else if (found->second.shape != tensor.layout.shape || found->second.dtype != tensor.layout.dtype) {
      difference += "\n  " + tensor.section + " " + tensor.layout.name + ": " +
                    describe(found->second.dtype, found->second.shape) + " in the checkpoint, " +
                    describe(tensor.layout.dtype, tensor.layout.shape) + " in the model";
    }
  }
  if (!difference.empty())
    throw ConfigError("the model does not fit the checkpoint '" + path + "':" + difference +
                      "\nMend: start with the flags it was trained with");
  for (const StateTensor& tensor : state) {
    if ((weights_only && tensor.section != "weights") || tensor.local.numel() == 0) continue;
    at::Tensor host = tensor.local.is_cpu() && tensor.local.is_contiguous()
                          ? tensor.local
                          : at::empty_like(tensor.local, at::TensorOptions(at::kCPU), at::MemoryFormat::Contiguous);
    reader.read(format::tensor_key(tensor.section, tensor.layout.name), tensor.layout.boxes[world_.rank()],
                bytes_of(host));
    if (!host.is_same(tensor.local)) tensor.local.copy_(host);
  }
  progress = {.step = manifest.step,
              .samples = manifest.samples,
              .config_json = manifest.config_json,
              .record_json = manifest.record_json,
              .data_fingerprint = manifest.data_fingerprint};
}

std::optional<Progress> Store::load_newest(const std::vector<StateTensor>& state) {
  std::string listing;  // rank 0's view decides: directory listings of a network file system may differ
  int found = 0;
  if (world_.rank() == 0) {
    for (const format::Candidate& candidate : format::list_candidates(fs_, checkpoints())) {
      if (!candidate.complete) {
        LOG(INFO) << candidate.path << " was never finished; removing it";
        succeeds("removing " + candidate.path, [&] { remove_leftover(fs_, candidate.path); });
        continue;
      }
      ++found;
      if (!candidate.quarantined) listing += candidate.path + "\n";
    }
  }
  found = static_cast<int>(*broadcast_number(world_, found).const_data_ptr<int64_t>());
  listing = broadcast_text(world_, listing);
  if (found == 0) return std::nullopt;
  for (size_t begin = 0; begin < listing.size();) {
    const size_t end = listing.find('\n', begin);
    const std::string path = listing.substr(begin, end - begin);
    begin = end + 1;
    Progress progress;
    const bool good = succeeds("loading " + path, [&] { read_into(path, state, /*weights_only=*/false, progress); });
    if (all_agree(world_, good)) {
      parent_step_ = progress.step;
      if (world_.rank() == 0) LOG(INFO) << "resuming from " << path;
      return progress;
    }
    if (world_.rank() == 0) {
      LOG(ERROR) << path << " is damaged and put in quarantine; falling back to the checkpoint before it";
      succeeds("marking " + path, [&] { fs_.create_exclusive(path + "/QUARANTINED", 0600)->close(); });
    }
  }
  throw CorruptData("none of the " + std::to_string(found) + " checkpoints in " + checkpoints() +
                    " is good. Mend: look at them with lockstep verify; start over only on purpose, with "
                    "--resume=never or another --run_dir");
}

Progress Store::load(const std::string& path, const std::vector<StateTensor>& state, bool weights_only) {
  Progress progress;
  read_into(format::resolve_checkpoint(fs_, path), state, weights_only, progress);
  if (!weights_only) parent_step_ = progress.step;
  return progress;
}

}  // namespace lockstep::checkpoint
