#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <unistd.h>

#include <lockstep/base/error.h>
#include <lockstep/base/fs.h>
#include <lockstep/format/manifest.h>
#include <lockstep/format/progress.h>
#include <lockstep/format/tensor_file.h>

namespace lockstep::format {

/// Whose files are read. Checksums find accidents, not forgers: what somebody else wrote is theirs to decide.
enum class Trust {
  kOwn,  ///< files of the effective user only
  kAny,  ///< anybody's: to look at them, or because a person said so (--trust_foreign_checkpoint)
};

/// Bytes that lie side by side in a stored box and in a wanted one, within one chunk of the stored box.
struct ChunkRun {
  uint64_t chunk = 0;
  uint64_t offset = 0;  ///< in the chunk
  uint64_t target = 0;  ///< in the memory of the wanted box
  uint64_t bytes = 0;
};
/// Calls `take` for every such stretch; chunks, offsets and targets rise.
void for_each_chunk_run(const Box& stored, const Box& wanted, uint64_t item_bytes,
                        const std::function<void(const ChunkRun&)>& take);

/// A checkpoint opened for reading. On opening: manifest, file sizes, shard headers and their checksums, and that the
/// headers hold the boxes the manifest lists; so later allocations are bounded by bytes that exist. Every data byte is
/// checked when it is read. Whatever the manifest says, only regular files are opened, and only of the folder itself:
/// no link, no FIFO, no path that leads elsewhere.
///
/// Threads: const members may run at once.
class Reader {
 public:
  /// @throws CorruptData damaged; ConfigError written by a newer format version, or by somebody else; IoError cannot be
  /// read.
  explicit Reader(Fs& fs, const std::string& path, Trust trust = Trust::kOwn);

  const Manifest& manifest() const { return manifest_; }
  const std::string& path() const { return path_; }
  const std::string& manifest_digest() const { return manifest_digest_; }  ///< XXH3-128 of the file MANIFEST
  const std::string& manifest_sha256() const { return manifest_sha256_; }  ///< of the same bytes
  bool is_foreign() const { return owner_ != geteuid(); }                  ///< whether a file belongs to somebody else
  std::string owner_name() const;                                          ///< "name (uid N)" of that user, else of us

  /// Fills `target` (laid out as `wanted`, a box of tensor `key`) from whatever boxes are stored. Each chunk is read
  /// whole and its CRC32C checked in memory before its bytes count, straight in `target` where the chunk is contiguous
  /// there, through one chunk of scratch where it is not. After an exception `target` holds rubbish.
  /// @throws CorruptData naming file, tensor and chunk; IoError.
  void read(const std::string& key, const Box& wanted, std::span<std::byte> target) const;

  /// One chunk of a stored box of tensor `key`, checked; `target` has its size. @throws as read().
  void read_chunk(const std::string& key, const StoredBox& stored, uint64_t chunk, std::span<std::byte> target) const;

  /// XXH3-128 of the global tensor in row-major order: the same for any layout it was saved in. Streams a chunk at a
  /// time what is stored whole or cut along its first dim; assembles the tensor in memory for other cuts.
  std::string tensor_digest(const std::string& key) const;

  /// Reads every byte of the tensor, checks it, keeps nothing.
  void verify_tensor(const std::string& key) const;
  /// Reads the whole file against its SHA-256, which the manifest must have. @throws CorruptData, IoError.
  void verify_sha256(size_t file) const;

 private:
  struct StoredEntry {  // a tensor's box in a shard
    TensorEntry entry;
    std::vector<uint32_t> chunk_crcs;
  };
  struct Shard {
    std::unique_ptr<File> file;
    uint64_t data_start = 0;
    std::map<std::string, StoredEntry> entries;
  };
  using TakeChunk = std::function<void(std::span<const std::byte>)>;

  std::unique_ptr<File> open_trusted(Folder& folder, const std::string& name);
  TensorHeader read_trusted_header(const File& file, const StoredFile& stored) const;
  void open_shard(Folder& folder, const StoredFile& stored);
  std::string file_path(const std::string& name) const { return path_ + "/" + name; }
  void check_boxes() const;
  std::string what(const std::string& key, size_t file) const;
  void copy_part(const std::string& key, const StoredBox& stored, const Box& wanted, std::span<std::byte> target) const;
  void stream(const std::string& key, const StoredBox& stored, const TakeChunk& take) const;

  std::string path_;
  Trust trust_;
  uint32_t owner_ = geteuid();
  std::string manifest_digest_, manifest_sha256_;
  Manifest manifest_;
  std::vector<Shard> shards_;
};

/// Digests over lines "key dtype size size... digest" of all tensors of a kind, in key order.
struct CheckpointDigests {
  std::map<std::string, std::string> tensors;  ///< by key
  std::string weights;                         ///< sections "weights" and "buffers"
  std::string optimizer;                       ///< every other section
};
/// Reads every byte once. `threads` 0: one a core, 8 at most. @throws CorruptData, IoError.
CheckpointDigests compute_digests(const Reader& reader, const ProgressCallback& progress = {}, int threads = 0);

/// Whether the checkpoint is at fault and not the storage under it: a name that leads nowhere, or to no regular file.
bool is_damage(const IoError& error);

/// Whether a checkpoint is the one a person means. CRCs tell accidents; a forger makes them anew.
struct Authenticity {
  std::string expected;  ///< SHA-256 of MANIFEST, which must then have one of every shard; empty: nothing is expected
  std::string found;     ///< that of the MANIFEST that was read; empty: it could not be
};

/// Everything wrong with a checkpoint, anybody's; one message each; empty: every byte is good. SHA-256 sums in the
/// manifest are checked too. Never throws for corrupt data.
/// @throws IoError when storage keeps it from being read: nothing is known then.
std::vector<std::string> verify(Fs& fs, const std::string& path, const ProgressCallback& progress = {}, int threads = 0,
                                Authenticity* authenticity = nullptr);

}  // namespace lockstep::format
