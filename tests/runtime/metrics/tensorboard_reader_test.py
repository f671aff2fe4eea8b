"""TensorBoard's own reader reads our event files, and after a resume sees each step once.

Usage: tensorboard_reader_test.py WRITE_EVENTS VENV_PYTHON. Exit 77: skipped, with the reason.
"""
import os
import subprocess
import sys
import tempfile

write_events, python = sys.argv[1:3]
if os.path.realpath(sys.prefix) != os.path.realpath(os.path.dirname(os.path.dirname(python))):
    if not os.path.exists(python):
        print("SKIPPED: tensorboard_reader: no Python environment. Mend: cmake/setup.sh test")
        sys.exit(77)
    os.execv(python, [python, *sys.argv])
try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as error:
    print(f"SKIPPED: tensorboard_reader: {error}. Mend: cmake/setup.sh test")
    sys.exit(77)

with tempfile.TemporaryDirectory() as folder:
    subprocess.run([write_events, folder], check=True)
    events = EventAccumulator(folder).Reload()
    loss = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert loss == [(1, 11), (2, 12), (3, 13), (4, 24), (5, 25), (6, 26), (7, 27)], loss
    assert [point.step for point in events.Scalars("validation/loss")] == [4, 5, 6, 7]
print("TensorBoard reads 7 steps, each once")
