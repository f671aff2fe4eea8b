#pragma once

#include <cstdint>

namespace lockstep::data {

/// What `tokenize` writes and llm.c reads: 256 little-endian int32 (magic, version, token count, zeros), then the
/// tokens. Source: llm.c, dev/data/data_common.py.
inline constexpr uint64_t kTokenHeaderBytes = 1024;
inline constexpr int32_t kTokenMagicU16 = 20240520;  ///< version 1, uint16 tokens
inline constexpr int32_t kTokenMagicU32 = 20240801;  ///< version 7, uint32 tokens

}  // namespace lockstep::data
