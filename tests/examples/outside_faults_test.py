"""outside_faults_test.py BIN_DIR: what a job says and ends with when what it stands on goes: its memory limit is too small, its data go bad while it trains,
its log directory is full, every checkpoint is damaged. RELIABILITY T15 to T18, five of each. Memory limits and full disks need root."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import machines
import runs

SMALL = ["--layers=1", "--width=32", "--heads=2", "--sequence_length=32", "--global_batch_size=8", "--micro_batch_size=1", "--eval_interval_steps=0"]
LARGE = [*SMALL, "--layers=8", "--width=1024", "--heads=8"]  # 100 M parameters: 1.6 GB with their optimizer
ENDLESS = ["--steps=1000000", "--checkpoint_interval_steps=0"]
GOES_ON, BAD_DATA, SAME_AGAIN = 0, 65, 77


def started(words, **options):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, **options)
    return done.returncode, done.stdout + done.stderr


def out_of_memory(bin_dir, folder, data):
    for number, (ranks, mib) in enumerate(((1, 400), (2, 600), (2, 900), (3, 900), (4, 1200))):
        words = runs.command(bin_dir, "gpt", ranks, folder / f"memory-{number}", [data, "--steps=3", *LARGE], ["--restarts=3"])
        with machines.MemoryLimit(mib << 20) as limit:
            code, said = started(words, preexec_fn=limit.join)
        assert code == SAME_AGAIN, f"exit {code} on {ranks} ranks in {mib} MiB:\n{said[-3000:]}"
        assert "died by signal 9 (Killed); the kernel ended a process of this machine for want of memory meanwhile" in said, said[-3000:]
        assert "the same failure came twice (out of memory)" in said and said.count("lockstep: starting again") == 1, said[-3000:]
        yield f"{ranks} ranks in {mib} MiB"


def bad_data(bin_dir, folder, _):
    """The reader thread of a rank meets it; the rank ends with what it met, and the job with it."""
    def cut(path):
        os.truncate(path, 3000)

    def overwrite(path):
        with open(path, "r+b") as file:
            file.seek(1024)
            file.write(b"\xff\xfe" * ((os.path.getsize(path) - 1024) // 2))

    for number, (ranks, deed, words) in enumerate(((1, cut, "bytes too early"), (2, cut, "bytes too early"), (4, cut, "bytes too early"), (1, overwrite, "has id "), (3, overwrite, "has id "))):
        path = folder / f"bad-{number}.bin"
        runs.write_tokens(path, 40_000)
        job = runs.Job(runs.command(bin_dir, "gpt", ranks, folder / f"bad-data-{number}", [f"--train_data={path}", *ENDLESS, *SMALL], ["--restarts=3"]))
        try:
            job.until(lambda: job.step() >= 3, "it trains")
            deed(path)
            code = job.wait(60)
        finally:
            job.end()
        assert code == BAD_DATA, f"exit {code}:\n{job.said()[-3000:]}"
        first = next(line for _, line in job.lines if line.startswith("lockstep: first failure:")) if ranks > 1 else job.said()
        assert str(path) in first and words in first, f"not {words!r} of {path} in: {first}"
        assert "starting again" not in job.said(), job.said()[-3000:]
        yield f"{ranks} ranks, data {deed.__name__}"


def full_logs(bin_dir, folder, data):
    for ranks in (1, 2, 3, 4, 5):
        run_dir = folder / f"logs-{ranks}"
        (run_dir / "logs").mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", run_dir / "logs"], check=True)
        try:
            subprocess.run(["dd", "if=/dev/zero", f"of={run_dir / 'logs' / 'filler'}"], stderr=subprocess.DEVNULL)
            assert shutil.disk_usage(run_dir / "logs").free == 0, "there is room left: this test would prove nothing"
            said = runs.run(bin_dir, "gpt", ranks, run_dir, [data, "--steps=30", "--checkpoint_interval_steps=10", *SMALL], expect=GOES_ON)
        finally:
            subprocess.run(["umount", run_dir / "logs"], check=True)
        assert "step 30/30" in said and runs.durable_step(run_dir) == 30, said[-3000:]
        yield f"{ranks} ranks, logs full"


def damaged_checkpoints(bin_dir, folder, data):
    def flip(path):
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) - 100)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))

    def halve(path):
        os.truncate(path, os.path.getsize(path) // 2)

    def zero(path):
        path.write_bytes(bytes(os.path.getsize(path)))

    run_dir = folder / "damaged"
    command = [data, "--checkpoint_interval_steps=10", *SMALL]
    runs.run(bin_dir, "gpt", 2, run_dir, ["--steps=30", *command])
    for number, (ranks, deed, pattern) in enumerate(((2, flip, "*.safetensors"), (2, halve, "*.safetensors"), (1, zero, "*.safetensors"), (3, flip, "MANIFEST"), (2, os.remove, "MANIFEST"))):
        copy = folder / f"damaged-{number}"
        shutil.copytree(run_dir, copy)
        for path in copy.glob(f"checkpoints/step-*/{pattern}"):
            deed(path)
        said = runs.run(bin_dir, "gpt", ranks, copy, ["--steps=60", *command], expect=BAD_DATA)
        assert f"no checkpoint in '{copy / 'checkpoints'}' is good" in said and "--resume=never" in said, said[-3000:]
        assert not runs.metrics(copy) or runs.metrics(copy)[-1]["step"] == 30, "it trained from scratch in silence"
        yield f"{ranks} ranks, every {pattern} {deed.__name__}"


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    why_not = {out_of_memory: machines.why_no_memory_limit(), full_logs: None if os.geteuid() == 0 else "mounting needs root"}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 40_000)
        for kind in (out_of_memory, bad_data, full_logs, damaged_checkpoints):
            if why := why_not.get(kind):
                print(f"SKIPPED: outside_faults {kind.__name__}: {why}")
                continue
            tried = list(kind(bin_dir, folder, f"--train_data={folder / 'train.bin'}"))
            assert len(tried) == 5, tried
            print(f"{kind.__name__}: {'; '.join(tried)}", flush=True)


if __name__ == "__main__":
    main()
