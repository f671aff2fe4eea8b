#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

/// What every fuzz target defines: libFuzzer calls it with what it makes up, replay.cc with the seeds.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

/// A promise that holds for every input. Both drivers keep the input of an abort.
#define FUZZ_CHECK(condition)                                                           \
  if (!(condition)) {                                                                   \
    std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
    std::abort();                                                                       \
  }
