#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include <lockstep/base/fs.h>
#include <lockstep/format/box.h>

namespace lockstep::format {

/// A box of a tensor and the shard file it lies in.
struct StoredBox {
  Box box;
  size_t file = 0;  ///< index into Manifest::files
};

struct StoredTensor {
  std::string dtype;
  std::vector<int64_t> shape;  ///< global
  std::vector<StoredBox> boxes;
};

struct StoredFile {
  std::string name;
  uint64_t bytes = 0;
  uint32_t header_crc = 0;  ///< of all bytes before the data
  std::string sha256 = {};  ///< of all bytes, 64 lower-case hex digits; empty: the save made none
};

/// MANIFEST: what a checkpoint holds. It is written last, so a folder without one is no checkpoint. FORMAT.md has the
/// bytes.
struct Manifest {
  int64_t step = 0;
  uint64_t epoch = 0;
  int64_t samples = 0;
  int64_t world_size = 1;
  int64_t parent_step = -1;  ///< the step this run was resumed from, -1: none
  std::string config_json = "{}", record_json = "{}", data_fingerprint;
  std::vector<StoredFile> files;
  std::map<std::string, StoredTensor> tensors;  ///< by key: "name" for weights, "section:name" for the rest
};

inline constexpr const char* kManifestName = "MANIFEST";
inline constexpr uint64_t kMaxManifestBytes = 64 << 20;
inline constexpr size_t kMaxTensors = 1'000'000;

/// Whether a name out of a file may be opened in the folder of that file: [A-Za-z0-9._-]{1,200}, no leading dot.
bool is_file_name(const std::string& name);

/// @throws CheckFailed whatever parse_manifest() would refuse: it must not become durable.
std::string encode_manifest(const Manifest& manifest);
/// Takes at most the text's size + 64 MiB of memory; a manifest that describes more is refused.
/// @throws CorruptData checksum, syntax, limits, a file name that could leave the folder, boxes that do not tile their
/// tensor; ConfigError a format version this program does not know.
Manifest parse_manifest(const std::string& text, const std::string& path);

inline constexpr const char* kQuarantineName = "QUARANTINED";  ///< an empty file: a load found the folder damaged
inline constexpr const char* kRetiredSuffix = ".retired";      ///< of a folder's name: it is being removed on purpose

inline constexpr const char* kWeights = "weights";  ///< parameters
inline constexpr const char* kBuffers = "buffers";  ///< what a model keeps beside them, e.g. batch norm's averages
/// Whether a section is part of the model, not of the optimizer.
bool is_weights_section(const std::string& section);

/// "weights" keys are plain names: other readers see a usual model file.
std::string tensor_key(const std::string& section, const std::string& name);
/// The section of a key.
std::string section_of(const std::string& key);

/// A folder "step-00001000.e0001" of a run.
struct Candidate {
  int64_t step = 0;
  uint64_t epoch = 0;
  std::string path;
  bool complete = false;     ///< has a MANIFEST
  bool quarantined = false;  ///< an earlier load found it bad
};
std::string directory_name(int64_t step, uint64_t epoch);
std::string shard_name(int64_t rank, int64_t world_size);
/// Newest first: by epoch, then step. Other names are ignored.
std::vector<Candidate> list_candidates(Fs& fs, const std::string& checkpoints_directory);
/// The first in that order that is complete and not in quarantine.
std::optional<Candidate> newest_complete(Fs& fs, const std::string& checkpoints_directory);
/// The checkpoint a path means: itself when it has a MANIFEST, else the newest complete one of the run it is.
/// @throws ConfigError when there is none.
std::string resolve_checkpoint(Fs& fs, const std::string& checkpoint_or_run);

}  // namespace lockstep::format
