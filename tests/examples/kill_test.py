"""kill_test.py BIN_DIR: SIGKILL of a random rank at ten random moments; each time the others end, the code says "run again", and a second start
ends with the same bits as a run that was left alone."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

RANKS, ROUNDS = 3, 10
RUN_AGAIN = 75
FLAGS = ["--steps=60", "--checkpoint_interval_steps=3", "--eval_interval_steps=0", "--layers=2", "--width=48", "--heads=3", "--sequence_length=64", "--global_batch_size=32",
         "--micro_batch_size=4", "--warmup_steps=5", "--log_interval_steps=1000"]


def ranks_of(run_dir):
    return runs.processes_of(run_dir, "gpt")  # not lockstep, not mpirun


def kill_one(bin_dir, run_dir, flags, delay_s, generator):
    """Starts a run and kills one of its ranks `delay_s` after all are there. Returns whether there was still one to kill."""
    job = subprocess.Popen(runs.command(bin_dir, "gpt", RANKS, run_dir, flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while len(ranks_of(run_dir)) < RANKS and job.poll() is None:
        time.sleep(0.005)
    time.sleep(delay_s)
    alive = ranks_of(run_dir)
    if alive:
        try:
            os.kill(generator.choice(alive), signal.SIGKILL)
        except ProcessLookupError:
            alive = []
    said = job.communicate(timeout=120)[1]
    killed = bool(alive) and job.returncode != 0  # a rank that dies after the last checkpoint's end may leave a 0
    assert not killed or job.returncode == RUN_AGAIN, f"exit {job.returncode}, not {RUN_AGAIN}:\n{said[-3000:]}"
    assert not ranks_of(run_dir), "a rank outlived the job"
    return killed


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    seed = int(os.environ.get("LOCKSTEP_SEED", time.time_ns() % 100_000))
    print(f"seed {seed}; again with LOCKSTEP_SEED={seed}", flush=True)
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 40_000)
        flags = [f"--train_data={folder / 'train.bin'}", *FLAGS]
        start = time.monotonic()
        runs.run(bin_dir, "gpt", RANKS, folder / "alone", flags)
        whole_s = time.monotonic() - start
        expected = runs.digests(bin_dir, folder / "alone"), runs.losses(folder / "alone")
        kills = 0
        for number in range(ROUNDS):
            run_dir = folder / f"killed-{number}"
            delay_s = generator.uniform(0, 0.9 * whole_s)
            killed = kill_one(bin_dir, run_dir, flags, delay_s, generator)
            kills += killed
            before = runs.metrics(run_dir)[-1]["step"] if (run_dir / "metrics.jsonl").exists() and runs.metrics(run_dir) else 0
            runs.run(bin_dir, "gpt", RANKS, run_dir, flags)
            found = runs.digests(bin_dir, run_dir), runs.losses(run_dir)
            assert found == expected, f"round {number}, killed {delay_s:.3f} s after the start: {found[0]}, expected {expected[0]}, or losses differ: steps {[step for step, _ in found[1]]}"
            print(f"round {number}: {'killed' if killed else 'already over'} after {delay_s:.2f} s, about step {before}; same bits", flush=True)
        assert kills >= ROUNDS // 2, f"only {kills} of {ROUNDS} kills met a living run"


if __name__ == "__main__":
    main()
