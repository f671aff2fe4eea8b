#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace lockstep::data {

/// One token file of any known format, read with pread: a truncated file is an error, not SIGBUS.
class TokenFile {
 public:
  virtual ~TokenFile() = default;
  virtual int64_t num_tokens() const = 0;
  /// Tokens [first, first + tokens.size()). @throws CorruptData an id of vocab_size or more, naming file and position.
  virtual void read(int64_t first, std::span<int64_t> tokens, int64_t vocab_size) const = 0;
  /// Name without folder, size, and a hash of the first and last KiB: cheap, and enough to notice another file.
  virtual std::string fingerprint() const = 0;
};

/// Format by content: llm.c header (u16 or u32), Megatron when PATH with .idx stands beside, else nanoGPT's bare u16.
/// @throws CorruptData a header that does not fit the file's size.
std::unique_ptr<TokenFile> open_token_file(const std::string& path);

}  // namespace lockstep::data
