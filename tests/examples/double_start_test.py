"""double_start_test.py BIN_DIR: two to four jobs are started on one run directory, some at once, with and without --take_over, and one
of them is stopped for a while (SIGSTOP). One line of steps comes out of it, with the bits of an undisturbed run: whoever is not its owner ends
with 73, and no file holds anything of two of them.

20 cases, 500 with LOCKSTEP_DEEP. And a tenth as many bursts: five at the very same moment on one folder, new or used, so that they meet before any of them trains."""

import concurrent.futures
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

FENCED, STEPS, SIDE_BY_SIDE = 73, 60, 2
FLAGS = [f"--steps={STEPS}", "--checkpoint_interval_steps=3", "--eval_interval_steps=0", "--layers=2", "--width=96", "--heads=3", "--sequence_length=64", "--global_batch_size=32",
         "--micro_batch_size=4", "--warmup_steps=5", "--log_interval_steps=1000"]


def send(processes, which):
    for process in processes:
        try:
            os.kill(process, which)
        except ProcessLookupError:
            pass


def descendants(process):
    """A job's ranks, to tell them from another job's on the same run directory."""
    found = []
    try:
        for task in pathlib.Path("/proc", str(process), "task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    except OSError:
        pass
    return found


class Case:
    def __init__(self, number, seed):
        generator = random.Random(seed * 1000 + number)
        self.number, self.take_over = number, number % 2 == 1
        jobs = 2 + number % 3
        at = 0.0
        self.events = []  # (seconds, what, job), in order
        for job in range(jobs):
            self.events.append((at, "start", job))
            at += generator.choice([0.0, 0.02, generator.uniform(0, 0.6), generator.uniform(0.6, 2.5)])
        self.ranks = [generator.choice([1, 2]) for _ in range(jobs)]
        victim = generator.choice([0, 0, generator.randrange(jobs)])
        stop = self.events[victim][0] + generator.uniform(0.05, 2.5)
        self.events += [(stop, "stop", victim), (stop + generator.uniform(0.3, 3.0), "continue", victim)]
        self.events.sort()

    def __str__(self):
        return f"case {self.number}{', --take_over' if self.take_over else ''}, ranks {self.ranks}: " + ", ".join(f"{at:.2f} s {what} {job}" for at, what, job in self.events)

    def play(self, bin_dir, run_dir, flags):
        """Returns exit codes and what was said, by job."""
        jobs, start, stopped = {}, time.monotonic(), []
        try:
            for at, what, job in self.events:
                time.sleep(max(0.0, start + at - time.monotonic()))
                if what == "start":
                    more = ["--take_over"] if self.take_over and job > 0 else []
                    said = open(f"{run_dir}.{job}.log", "w+")
                    jobs[job] = subprocess.Popen(runs.command(bin_dir, "gpt", self.ranks[job], run_dir, [*flags, *more]), stdout=said, stderr=said), said
                elif what == "stop":
                    stopped = [process for process in descendants(jobs[job][0].pid) if process in runs.processes_of(run_dir, "gpt")]
                    send(stopped, signal.SIGSTOP)
                else:
                    send(stopped, signal.SIGCONT)
            codes, texts = [], []
            for job in sorted(jobs):
                codes.append(jobs[job][0].wait(timeout=120))
                jobs[job][1].seek(0)
                texts.append(jobs[job][1].read())
            return codes, texts
        finally:
            send(stopped, signal.SIGCONT)
            for process, said in jobs.values():
                if process.poll() is None:
                    send([*descendants(process.pid), process.pid], signal.SIGKILL)
                    process.wait()
                said.close()


def check(bin_dir, run_dir, codes, texts, expected_losses, expected_digests):
    told = "\n".join(f"--- job {job} ended with {code}:\n{text[-1500:]}" for job, (code, text) in enumerate(zip(codes, texts)))
    assert set(codes) <= {0, FENCED}, f"other codes than 0 and {FENCED}: {codes}\n{told}"
    assert 0 in codes, f"nobody came to the end: {codes}\n{told}"
    done = sum("this run is done" in text for text in texts)
    ledger = runs.events(run_dir)
    ends = [event for event in ledger if event["event"] == "end"]
    # One that was superseded between its last save and its last word is at the end too; the newer start found it there.
    assert len(ends) == 1 or (done > 0 and not ends), f"{len(ends)} came to the end, not one\n{told}"
    assert codes.count(0) == 1 + done, f"{codes}, and {done} found the run done\n{told}"
    epochs = [event["epoch"] for event in ledger if "epoch" in event]
    assert epochs == sorted(epochs), f"an older start wrote into the ledger after a newer one: {epochs}\n{told}"
    owner = [event["epoch"] for event in ledger if event["event"] in ("start", "resume")][-1]
    assert json.loads((run_dir / "run.json").read_text())["epoch"] == owner, f"run.json is of another start\n{told}"
    for folder in (run_dir / "checkpoints").iterdir():
        assert not folder.name.endswith(".retired") and (folder / "MANIFEST").exists(), f"{folder.name} is left over: {[file.name for file in folder.iterdir()]}\n{told}"
        manifest = json.loads((folder / "MANIFEST").read_text().splitlines()[0])
        assert folder.name == f"step-{manifest['step']:08d}.e{manifest['epoch']:04d}", f"{folder.name} holds step {manifest['step']} of epoch {manifest['epoch']}"
        assert len(list(folder.iterdir())) == 1 + len(manifest["files"]), f"{folder.name} holds files of another start\n{told}"
        verified = subprocess.run([str(bin_dir / "lockstep"), "verify", str(folder)], capture_output=True, text=True)
        assert verified.returncode == 0, f"{folder.name}: {verified.stdout + verified.stderr}\n{told}"
    assert runs.digests(bin_dir, run_dir) == expected_digests, f"another end\n{told}"
    try:
        losses = runs.losses(run_dir)
    except ValueError:
        raise AssertionError(f"metrics.jsonl holds torn lines:\n{(run_dir / 'metrics.jsonl').read_text()}\n{told}") from None
    assert losses == expected_losses, f"other losses: steps {[step for step, _ in losses]}\n{told}"
    return sum(code == FENCED for code in codes)


def burst(bin_dir, run_dir, flags, take_over):
    """Five at once on a new folder, then five more on what they left."""
    for _ in range(2):
        jobs = [subprocess.Popen([str(bin_dir / "gpt"), f"--run_dir={run_dir}", *flags, *(["--take_over"] if take_over else [])], stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, text=True) for _ in range(5)]
        texts = [job.communicate()[0] for job in jobs]
        codes = [job.returncode for job in jobs]
        told = "\n".join(text[-500:] for code, text in zip(codes, texts) if code not in (0, FENCED))
        assert set(codes) <= {0, FENCED}, f"other codes than 0 and {FENCED}: {codes}\n{told}"
    ledger = runs.events(run_dir)
    epochs = [event["epoch"] for event in ledger if "epoch" in event]
    assert epochs == sorted(epochs), f"an older start wrote into the ledger after a newer one: {epochs}"
    assert ledger[0]["event"] == "start", f"the ledger lost its beginning: {ledger[0]}"
    assert json.loads((run_dir / "run.json").read_text())["epoch"] == epochs[-1]
    left = {file.name for file in run_dir.iterdir()} - {"checkpoints", "epoch", "logs", "run.json", "ledger.jsonl", "metrics.jsonl"}
    assert all(name.startswith("events.out.") for name in left), f"left over: {left}"


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    seed = int(os.environ.get("LOCKSTEP_SEED", time.time_ns() % 100_000))
    cases = 500 if os.environ.get("LOCKSTEP_DEEP") else 20
    print(f"seed {seed}; again with LOCKSTEP_SEED={seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 40_000)
        flags = [f"--train_data={folder / 'train.bin'}", *FLAGS]
        runs.run(bin_dir, "gpt", 1, folder / "alone", flags)
        expected = runs.losses(folder / "alone"), runs.digests(bin_dir, folder / "alone")

        tiny = [f"--train_data={folder / 'train.bin'}", *FLAGS, "--steps=4", "--checkpoint_interval_steps=1", "--warmup_steps=1", "--layers=1", "--width=24"]
        for number in range(cases // 10):
            burst(bin_dir, folder / f"burst-{number}", tiny, number % 2 == 1)

        def try_case(number):
            case = Case(number, seed)
            run_dir = folder / f"run-{number}"
            try:
                codes, texts = case.play(bin_dir, run_dir, flags)
                fenced = check(bin_dir, run_dir, codes, texts, *expected)
                runs.run(bin_dir, "gpt", 1, run_dir, flags)  # refuses a ledger whose chain is broken
            except Exception as error:
                return 0, 0, f"{case}\n{error}"
            finally:
                shutil.rmtree(run_dir, ignore_errors=True)
            print(f"{case}: {codes}", flush=True)
            return fenced, codes.count(0), ""

        with concurrent.futures.ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            results = list(pool.map(try_case, range(cases)))
        wrong = [text for _, _, text in results if text]
        for text in wrong[:5]:
            print(f"FAILED {text}\n", flush=True)
        print(f"{cases} cases: {sum(fenced for fenced, _, _ in results)} starts were fenced, {sum(ended for _, ended, _ in results)} came to the end, {len(wrong)} cases were wrong", flush=True)
        assert not wrong, f"{len(wrong)} of {cases} cases"
        assert sum(fenced for fenced, _, _ in results) >= cases // 2, "hardly any two met"


if __name__ == "__main__":
    main()
