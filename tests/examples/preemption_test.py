"""preemption_test.py BIN_DIR: USR1 or TERM to `lockstep run` at random moments, with 2, 5 and 30 s of grace. The job saves and ends with 75 in time, at
most one step is lost, and the same command goes on from there; the end has the bits of a run that was left alone.

20 preemptions, 300 with LOCKSTEP_DEEP."""

import os
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

RUN_AGAIN, STEPS_EACH = 75, 6
FLAGS = ["--checkpoint_interval_steps=100000", "--eval_interval_steps=0", "--layers=2", "--width=48", "--heads=3", "--sequence_length=64", "--global_batch_size=16",
         "--micro_batch_size=4", "--warmup_steps=5", "--log_interval_steps=1"]


def preempt(bin_dir, run_dir, ranks, flags, number, generator):
    """One start that is told to stop. Returns a line about it."""
    which, grace_s = (signal.SIGUSR1, signal.SIGTERM)[number % 2], (2, 5, 30)[number % 3]
    before = runs.durable_step(run_dir)
    job = runs.Job(runs.command(bin_dir, "gpt", ranks, run_dir, flags, [f"--grace_s={grace_s}"]))
    try:
        early = number % 5 == 4  # before its ranks are up
        if early:
            time.sleep(generator.uniform(0, 0.4))
        else:
            steps = generator.randrange(1, STEPS_EACH)
            job.until(lambda: job.step() >= max(before, 0) + steps, f"{steps} steps are done")
            time.sleep(generator.uniform(0, 0.05))
        job.process.send_signal(which)
        at = time.monotonic()
        code, took_s = job.wait(grace_s + 60), time.monotonic() - at
        said = job.said()
    finally:
        job.end()
    assert code == RUN_AGAIN, f"exit {code}, not {RUN_AGAIN}:\n{said[-3000:]}"
    assert "starting again" not in said, said[-3000:]
    assert took_s <= grace_s + 6, f"it took {took_s:.2f} s of {grace_s} s:\n{said[-3000:]}"  # mpirun may need to be ended on a busy machine
    saved_at = job.when(r"asked to stop by a signal: saved step", at)
    assert early or (saved_at is not None and saved_at - at <= grace_s), f"not saved within {grace_s} s of grace:\n{said[-3000:]}"
    saved, last = runs.durable_step(run_dir), job.step()
    assert saved >= last - 1, f"step {last} was reported, but only step {saved} is saved:\n{said[-3000:]}"
    return f"{which.name}, grace {grace_s} s{', early' if early else ''}: {'' if saved_at is None else f'saved after {saved_at - at:.2f} s, '}ended after {took_s:.2f} s, step {max(saved, 0)} saved, {last} reported"


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    seed = int(os.environ.get("LOCKSTEP_SEED", time.time_ns() % 100_000))
    print(f"seed {seed}; again with LOCKSTEP_SEED={seed}", flush=True)
    generator = random.Random(seed)
    preemptions = 300 if os.environ.get("LOCKSTEP_DEEP") else 20
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 40_000)
        flags = [f"--train_data={folder / 'train.bin'}", f"--steps={30 * preemptions}", *FLAGS]
        runs.run(bin_dir, "gpt", 1, folder / "alone", flags)
        for number in range(preemptions):
            ranks = (2, 3)[number % 2]
            print(f"{ranks} ranks, {preempt(bin_dir, folder / 'run', ranks, flags, number, generator)}", flush=True)
        runs.run(bin_dir, "gpt", 2, folder / "run", flags)
        runs.expect_nothing_lost(folder / "run")
        assert runs.digests(bin_dir, folder / "run") == runs.digests(bin_dir, folder / "alone")
        assert runs.losses(folder / "run") == runs.losses(folder / "alone"), "losses differ"


if __name__ == "__main__":
    main()
