"""bit_exact_resume_test.py BIN_DIR: a run of 200 steps that is killed at 20 random steps, a rank or the whole job, and goes on with
another number of ranks each time, has the losses, weights and optimizer state of one that was left alone, at every checkpoint on the way.

With LOCKSTEP_DEEP: ten such runs, which together are killed at every step."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

STEPS, KILLS = 200, 20
LAST_KILL = STEPS - 15  # what is said of a step arrives some steps later
RUN_AGAIN = 75
FLAGS = [f"--steps={STEPS}", "--checkpoint_interval_steps=5", "--keep_checkpoints=1000", "--eval_interval_steps=0", "--layers=2", "--width=48", "--heads=3", "--dropout=0.1",
         "--sequence_length=32", "--global_batch_size=16", "--micro_batch_size=2", "--learning_rate=2e-3", "--warmup_steps=5", "--log_interval_steps=1"]
LAYOUTS = [  # all of tier A; world sizes 2, 4, 1, 3 in turn
    [(2, ["--zero_stage=1"]), (2, ["--pipeline_parallel_size=2"]), (2, ["--zero_stage=3"])],
    [(4, ["--zero_stage=3", "--zero_shard_size=2"]), (4, ["--pipeline_parallel_size=2", "--zero_stage=1"]), (4, [])],
    [(1, [])],
    [(3, ["--zero_stage=2"]), (3, []), (3, ["--zero_stage=1", "--backend=mpi"])],
]


def kill(job, run_dir, ranks, generator):
    """SIGKILL of one rank, after which the launcher ends with "run again", or of all there is. Returns what it was."""
    whole = generator.random() < 0.3
    victims = runs.processes_of(run_dir) if whole else [generator.choice(runs.processes_of(run_dir, "gpt"))]
    generator.shuffle(victims)
    for process in victims:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:  # ended with the one before
            pass
    job.stderr.read()
    code = job.wait(timeout=60)
    deadline = time.monotonic() + 20
    while runs.processes_of(run_dir) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs.processes_of(run_dir), "a process outlived the job"
    assert code == RUN_AGAIN or (whole and code == -signal.SIGKILL), f"exit {code} after SIGKILL of {'the job' if whole else 'a rank'}"
    return "the job" if whole else f"one of {ranks}"


def run_until(bin_dir, run_dir, ranks, flags, step, generator, environment):
    """Starts the run and kills it once `step` is done. Returns a line about it."""
    job = subprocess.Popen(runs.command(bin_dir, "gpt", ranks, run_dir, flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    said = []
    for line in job.stderr:
        said.append(line)
        found = re.match(r"\s*step (\d+)/", line)
        if found and int(found[1]) >= step:
            return f"step {found[1]}: {kill(job, run_dir, ranks, generator)}"
    raise AssertionError(f"the run ended with {job.wait()} before step {step}:\n{''.join(said)[-3000:]}")


def expect_same(bin_dir, run_dir, alone, expected):
    """expected: digests of the run `alone` by folder's step."""
    assert runs.losses(run_dir) == runs.losses(alone), "losses differ"
    assert [line["grad_norm"] for line in runs.metrics(run_dir)] == [line["grad_norm"] for line in runs.metrics(alone)], "norms differ"
    found = sorted((run_dir / "checkpoints").iterdir())
    assert len(found) >= KILLS // 2, f"only {len(found)} checkpoints"
    for checkpoint in found:
        digests = runs.digests(bin_dir, checkpoint)
        assert digests == expected[digests[0]], f"{checkpoint.name}: {digests}, expected {expected[digests[0]]}"
    assert digests[0] == STEPS
    return len(found)


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    seed = int(os.environ.get("LOCKSTEP_SEED", time.time_ns() % 100_000))
    print(f"seed {seed}; again with LOCKSTEP_SEED={seed}", flush=True)
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        # Open MPI cannot clean up after a job that was killed as a whole; so its files lie where we do.
        (folder / "mpi").mkdir()
        environment = {**os.environ, "TMPDIR": str(folder / "mpi"), "OMPI_MCA_btl_vader_backing_directory": str(folder / "mpi"),
                       "OMPI_MCA_orte_tmpdir_base": str(folder / "mpi")}
        runs.write_tokens(folder / "train.bin", 40_000)
        flags = [f"--train_data={folder / 'train.bin'}", *FLAGS]
        alone = folder / "alone"
        runs.run(bin_dir, "gpt", 1, alone, flags)
        expected = {digests[0]: digests for digests in (runs.digests(bin_dir, path) for path in (alone / "checkpoints").iterdir())}
        assert len(expected) == STEPS // 5
        assert len(set(expected.values())) == len(expected)
        if os.environ.get("LOCKSTEP_DEEP"):
            chains = [list(range(1 + first, LAST_KILL, 10)) for first in range(10)]
        else:
            chains = [sorted(generator.sample(range(1, LAST_KILL), KILLS))]
        for number, steps in enumerate(chains):
            run_dir = folder / f"killed-{number}"
            for turn, step in enumerate(steps):
                ranks, layout = generator.choice(LAYOUTS[turn % len(LAYOUTS)])
                print(f"{ranks} ranks {' '.join(layout)}, {run_until(bin_dir, run_dir, ranks, [*flags, *layout], step, generator, environment)}", flush=True)
            ranks, layout = generator.choice(LAYOUTS[len(steps) % len(LAYOUTS)])
            runs.run(bin_dir, "gpt", ranks, run_dir, [*flags, *layout])
            starts = runs.expect_nothing_lost(run_dir)
            count = expect_same(bin_dir, run_dir, alone, expected)
            print(f"{len(steps)} kills, {starts} starts in the ledger: {STEPS} losses and {count} checkpoints have the bits of the run left alone", flush=True)


if __name__ == "__main__":
    main()
