#pragma once

#include <string>
#include <vector>

namespace lockstep {

/// Makes the calling thread compute like every other rank's threads: `threads` intra-op threads, denormals kept,
/// deterministic kernels. Call on every thread that runs torch, before its first operator: OpenMP's thread count and
/// the flush mode are per thread.
void configure_arithmetic(int threads);

/// What besides the program decides the bits: torch version, instruction sets, CPU model, threads, math-library
/// variables. Equal text on all ranks is a condition of tier A; stored with each run and checkpoint.
std::string arithmetic_record(int threads);

/// The same with the instruction sets that the CPU offers, as lines "key: value", to be compared over ranks.
std::string arithmetic_facts(int threads);
/// @param hosts, facts  of each rank.
/// @return a line for each way to differ from rank 0, which names ranks, hosts, keys and both values; empty: all alike.
std::string arithmetic_differences(const std::vector<std::string>& hosts, const std::vector<std::string>& facts);

}  // namespace lockstep
