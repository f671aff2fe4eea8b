#pragma once

#include <functional>
#include <vector>

#include "crash_fs.h"

namespace lockstep {

/// What a power loss after the first `prefix` operations may take, systematically. Of what is not synced:
///  - nothing, and every one or two operations alone (so that later ones overtook them);
///  - all but none, one or two;
///  - a part of one write: from or up to each 512 bytes, a single sector or a single page of 4 KiB; alone, together
///    with any one other operation, and with all others.
/// @param stride of the choices of two together: every n-th is visited, so that fewer are visited evenly.
void for_each_loss(const CrashFs& fs, size_t prefix, int64_t stride,
                   const std::function<void(const std::vector<CrashFs::Loss>&)>& visit);

}  // namespace lockstep
