#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <lockstep/data/dataset.h>

namespace lockstep::data {

struct TokenDatasetOptions {
  int64_t sequence_length = 0;  ///< T; a sample is T + 1 consecutive tokens, the next sample starts T later
  int64_t vocab_size = 0;       ///< every id read is checked against it
};

/// Opens token files (one path, or a glob; formats by content: llm.c header, Megatron .idx + .bin, otherwise nanoGPT
/// raw uint16, or what `tokenize` wrote beside it) as one stream of tokens cut into samples. Memory-mapped reads are
/// not used: a truncated file is an error, not SIGBUS. Batch: tensors = {tokens [B, T] i64, targets [B, T] i64}.
/// @throws ConfigError missing, empty or too short files, with the mend. @throws CorruptData bad header, size or token
/// id.
std::shared_ptr<const Dataset> open_token_dataset(const std::string& files, TokenDatasetOptions options);

}  // namespace lockstep::data
