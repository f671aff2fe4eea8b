"""What the Python tests share: tiny data made on the spot, runs of the real programs, and what a run left behind."""

import json
import os
import pathlib
import random
import subprocess


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


def command(bin_dir, program, ranks, run_dir, flags):
    """Through the launcher, which starts MPI for two and more ranks."""
    return [str(bin_dir / "lockstep"), "run", "-n", str(ranks), "--", str(bin_dir / program), f"--run_dir={run_dir}", *flags]


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


def inspect(bin_dir, path):
    done = subprocess.run([str(bin_dir / "lockstep"), "inspect", "--json", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def digests(bin_dir, run_dir):
    """Digests of the newest durable checkpoint, or of the one named: (step, weights, optimizer)."""
    answer = inspect(bin_dir, run_dir)
    return answer["step"], answer["weights_digest"], answer["optimizer_digest"]


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
