"""hang_test.py BIN_DIR: one rank of a training run is stopped; the run says which, leaves a record and ends with 76, and the next start goes on.
tests/collectives/hang_test.py has the other kinds."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

HUNG = 76
FLAGS = ["--steps=100000", "--checkpoint_interval_steps=50", "--keep_checkpoints=2", "--eval_interval_steps=0", "--layers=2", "--width=48", "--heads=3", "--sequence_length=64",
         "--global_batch_size=8", "--micro_batch_size=2", "--log_interval_steps=100000", "--hang_timeout_s=3"]


def rank_of(pid):
    environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(word.split(b"=")[1]) for word in environment if word.startswith(b"OMPI_COMM_WORLD_RANK="))


def steps_of(run_dir):
    return (run_dir / "metrics.jsonl").read_text().count("\n") if (run_dir / "metrics.jsonl").exists() else 0


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 40_000)
        run_dir, ranks = folder / "run", 3
        for culprit in (1, 0):
            job = subprocess.Popen(runs.command(bin_dir, "gpt", ranks, run_dir, [f"--train_data={folder / 'train.bin'}", *FLAGS]), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
            begun = steps_of(run_dir)
            while steps_of(run_dir) < begun + 20:
                assert job.poll() is None, job.communicate()[1]
                time.sleep(0.05)
            pid = next(pid for pid in runs.processes_of(run_dir, "gpt") if rank_of(pid) == culprit)
            os.kill(pid, signal.SIGSTOP)
            stopped = time.monotonic()
            said = job.communicate(timeout=60)[1]
            assert job.returncode == HUNG, f"exit {job.returncode}, not {HUNG}:\n{said[-3000:]}"
            assert f"rank {culprit} (host" in said and "is stopped" in said, said[-3000:]
            records = sorted(run_dir.glob("hang-*.json"))
            record = json.loads(records[-1].read_text())
            assert record["culprits"] == [culprit] and record["group"], record
            assert not runs.processes_of(run_dir), "something outlived the job"
            print(f"rank {culprit} stopped: named, and the job over after {time.monotonic() - stopped:.1f} s: {record['message']}", flush=True)
        assert len(list(run_dir.glob("hang-*.json"))) == 2


main()
