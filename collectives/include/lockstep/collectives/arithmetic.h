#pragma once

#include <string>

namespace lockstep {

/// Makes the calling thread compute like every other rank's threads: `threads` intra-op threads, denormals kept,
/// deterministic kernels. Call on every thread that runs torch, before its first operator: OpenMP's thread count and
/// the flush mode are per thread.
void configure_arithmetic(int threads);

/// What besides the program decides the bits: torch version, instruction sets, CPU model, threads, math-library
/// variables. Equal text on all ranks is a condition of tier A; stored with each run and checkpoint.
std::string arithmetic_record(int threads);

}  // namespace lockstep
