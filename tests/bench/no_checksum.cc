// Takes the place of the library's CRC32C in checkpoint_unchecked_bench: what is left is what a save or load would take
// without. Its checkpoints are its own: their checksums are all zero.
#include <lockstep/format/checksum.h>

namespace lockstep::format {

uint32_t crc32c(std::span<const std::byte>, uint32_t) { return 0; }
uint32_t crc32c(const std::string&) { return 0; }

}  // namespace lockstep::format
