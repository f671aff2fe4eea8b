"""What the Python tests share: tiny data made on the spot, runs of the real programs, and what a run left behind."""

import json
import os
import pathlib
import random
import re
import socket
import subprocess
import threading
import time


def write_tokens(path, count, seed=7, largest=None):
    """A token file (llm.c header, bytes as u16) of words that repeat, so that there is something to learn."""
    generator = random.Random(seed)
    words = [bytes(generator.randrange(97, 123) for _ in range(generator.randrange(2, 8))) + b" " for _ in range(60)]
    tokens = list(b"".join(generator.choice(words) for _ in range(count))[:count])
    if largest is not None:
        tokens[count // 2] = largest
    header = (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + count.to_bytes(4, "little")
    path.write_bytes(header.ljust(1024, b"\0") + b"".join(token.to_bytes(2, "little") for token in tokens))


def write_images(path, count, seed=7):
    """MNIST-like rows: 784 pixels and a label that one bright band tells."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        label = generator.randrange(10)
        rows.append(",".join(str(min(255, generator.randrange(60) + 180 * (i // 28 // 3 == label))) for i in range(784)) + f",{label}")
    path.write_text("\n".join(rows) + "\n")


def command(bin_dir, program, ranks, run_dir, flags, launcher_flags=("--restarts=0",)):
    """Through the launcher, which starts MPI for two and more ranks."""
    return [str(bin_dir / "lockstep"), "run", "-n", str(ranks), *launcher_flags, "--", str(bin_dir / program), f"--run_dir={run_dir}", *flags]


def run(bin_dir, program, ranks, run_dir, flags, expect=0, timeout=300, **environment):
    """Runs to the end and returns what was said; another exit code than `expect` fails the test."""
    done = subprocess.run(command(bin_dir, program, ranks, run_dir, flags), capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment})
    said = done.stdout + done.stderr
    assert done.returncode == expect, f"{program} on {ranks} ranks ended with {done.returncode}, not {expect}:\n{said[-4000:]}"
    return said


def metrics(run_dir):
    return [json.loads(line) for line in pathlib.Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    """Losses by step, as the exact text of the file would parse: equal floats are equal bits."""
    return [(line["step"], line["loss"]) for line in metrics(run_dir)]


def events(run_dir):
    return [json.loads(line) for line in pathlib.Path(run_dir, "ledger.jsonl").read_text().splitlines()]


def expect_nothing_lost(run_dir):
    """Each start went on where the last durable checkpoint was, or later. Returns the number of starts that came so far."""
    durable, starts = 0, 0
    for event in events(run_dir):
        if event["event"] in ("start", "resume"):
            starts += 1
            assert event["step"] >= durable, f"start {starts} went back to step {event['step']}, though {durable} was durable"
        elif event["event"] == "durable":
            durable = event["step"]
    return starts


def durable_step(run_dir):
    """Of the newest checkpoint with a manifest; -1: none."""
    return max((int(path.parent.name[5:13]) for path in pathlib.Path(run_dir, "checkpoints").glob("step-*/MANIFEST")), default=-1)


class Job:
    """A job in the background; what it says on standard error is kept line by line, with the time."""

    def __init__(self, words, **environment):
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, **environment})
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line))

    def said(self):
        return "".join(line for _, line in list(self.lines))

    def when(self, pattern, since=0.0):
        """When a line that matches was first said after `since`; None: not yet."""
        return next((at for at, line in list(self.lines) if at >= since and re.search(pattern, line)), None)

    def step(self, since=0.0):
        """The step it last reported after `since`; 0: none yet."""
        return next((int(found[1]) for at, line in reversed(list(self.lines)) if at >= since and (found := re.match(r"\s*step (\d+)/", line))), 0)

    def until(self, condition, what, timeout_s=120):
        """Polls; the job's end or the time running out fails the test."""
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the job ended with {self.process.returncode} before {what}:\n{self.said()[-4000:]}"
            assert time.monotonic() < end, f"{timeout_s} s and not yet {what}:\n{self.said()[-4000:]}"
            time.sleep(0.005)
        return value

    def wait(self, timeout_s=300):
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def end(self):
        """For tests that failed: nothing of it stays."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def inspect(bin_dir, path):
    done = subprocess.run([str(bin_dir / "lockstep"), "inspect", "--json", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digests(bin_dir, run_dir):
    """Digests of the newest durable checkpoint, or of the one named: (step, weights, optimizer)."""
    answer = inspect(bin_dir, run_dir)
    return answer["step"], answer["weights_digest"], answer["optimizer_digest"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def processes_of(run_dir, program=None):
    """What runs for run_dir: launcher, mpirun and ranks, or `program` alone."""
    found = []
    for process in pathlib.Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else [b""]
        except OSError:  # it ended meanwhile
            continue
        if f"--run_dir={run_dir}".encode() in words and program in (None, pathlib.Path(words[0].decode()).name):
            found.append(int(process.name))
    return sorted(found)
