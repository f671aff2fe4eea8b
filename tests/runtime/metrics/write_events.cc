// Two starts of a run: steps 1..5, then a resume from 3 that goes to 7. For tensorboard_reader_test.py.
#include <unistd.h>

#include <lockstep/metrics/run_log.h>

int main(int, char** argv) {
  using lockstep::metrics::TensorBoardWriter;
  {
    TensorBoardWriter writer(argv[1], 0);
    for (int step = 1; step <= 5; ++step) writer.scalars(step, {{"train/loss", 10.0 + step}});
  }
  sleep(1);  // readers order files by the second in their names
  TensorBoardWriter writer(argv[1], 3);
  for (int step = 4; step <= 7; ++step) writer.scalars(step, {{"train/loss", 20.0 + step}, {"validation/loss", 0.5}});
}
