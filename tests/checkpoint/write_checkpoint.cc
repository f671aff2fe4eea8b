// write_checkpoint RUN_DIR [KEEP]: one checkpoint of tests/checkpoint/state.h for each cut, for readers in other
// languages; the last KEEP of them stay.
#include <cstdio>
#include <cstdlib>

#include <lockstep/base/error.h>
#include <lockstep/collectives/local_group.h>

#include "state.h"

int main(int argc, char** argv) {
  using namespace lockstep;
  using namespace lockstep::checkpoint;
  if (argc != 2 && argc != 3) return 78;
  const std::string run_dir = argv[1];
  const int keep = argc == 3 ? std::atoi(argv[2]) : 10;
  constexpr int kWorldSize = 3;
  try {
    run_local_ranks(kWorldSize, [&](ProcessGroup& group) {
      Store store(real_fs(), group, {.run_dir = run_dir, .keep_last = keep});
      for (const Cut cut : kAllCuts) {
        const auto step = static_cast<int64_t>(cut) + 1;
        if (!store.save(progress_at(step), make_state(cut, kWorldSize, group.rank(), /*salt=*/1)))
          throw Error(ExitCode::kStorage, "a save failed");
      }
    });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
