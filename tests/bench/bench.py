"""bench.py [--rows PATTERN] [--rounds N]: ours and the peer in turn on this machine, in one run.

Each row alternates the two (ours, peer, peer, ours, ...), checks that both computed the same losses, and reports medians, spread and the
ratio ours / peer, greater is better. Writes build/bench.json: rows of {name, unit, ours, peer, peer_name, ratio, goal, met, spread}. Ends with 1
when a ratio is below its goal, or no row was measured.
"""

import argparse
import fnmatch
import json
import os
import pathlib
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
PYTHON, DATA = ROOT / "build/deps/venv/bin/python", ROOT / "build/data/shakespeare/train.bin"
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MPIRUN = ["mpirun", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "-n", "2"]
PEER = ROOT / "tests/bench/peers/train_gpt.py"
TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"

# facts of the rows: model flags, samples a step, timed steps
SIZES = {
    "tiny": (["--layers=4", "--width=128", "--heads=4", "--sequence_length=128"], 32, 40),
    "small": (["--layers=6", "--width=384", "--heads=6", "--sequence_length=256"], 8, 10),
}
# Ways to share the work: ranks, our flags, the peer's name, its settings to choose from, the ratio wanted.
EAGER_OR_COMPILED = {"eager": [], "compiled": ["--compile"]}
LAYOUTS = {
    "1 process": (1, [], "PyTorch", EAGER_OR_COMPILED, 1.0),
    "2 ranks": (2, [], "PyTorch DDP", EAGER_OR_COMPILED, 1.0),
    "zero3": (2, ["--zero_stage=3"], "PyTorch FSDP2", {"resharding": ["--fsdp=reshard"], "not resharding": ["--fsdp=keep"]}, 1.2),
    "tensor2": (2, ["--tensor_parallel_size=2"], "PyTorch DTensor", {"eager": ["--tensor"]}, 1.2),
}
PARALLEL_ROWS = [("small", "fp32", "zero3"), ("small", "bf16", "zero3"), ("small", "fp32", "tensor2")]
WARMUP_STEPS = 3
ALL_REDUCE_BYTES = [4, 1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20]
# Open MPI as it comes, its segmented ring, and what torch.distributed has on CPUs.
ALL_REDUCE_PEERS = {
    "Open MPI": {},
    "Open MPI, segmented ring": {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1", "OMPI_MCA_coll_tuned_allreduce_algorithm": "5",
                                 "OMPI_MCA_coll_tuned_allreduce_algorithm_segmentsize": str(1 << 20)},
    "gloo": None,
}


def run(command, **environment):
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else Python compiles its torch anew at every start
    result = subprocess.run([str(word) for word in command], env={**os.environ, **environment}, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{result.stderr[-3000:]}")
    return result.stdout


class TrainingRow:
    """Tokens a second of one size, precision and layout."""

    unit = "tokens/s"

    def __init__(self, bin_dir, size, precision, layout):
        self.bin_dir, self.name, self.precision = bin_dir, f"train/{size}/{precision}/{layout}", precision
        self.flags, self.batch, self.timed = SIZES[size]
        self.ranks, self.layout_flags, self.peer_name, self.peer_settings, self.goal = LAYOUTS[layout]
        self.steps, self.tokens = WARMUP_STEPS + self.timed, self.batch * int(self.flags[-1].split("=")[1])

    def why_not(self):
        known = subprocess.run([self.bin_dir / "gpt", "--help"], capture_output=True, text=True).stdout
        missing = [flag for flag in self.layout_flags if flag.split("=")[0] not in known]
        return f"gpt does not know {' '.join(missing)}" if missing else None

    def prepare(self, folder):
        self.folder = folder
        self.ours()  # leaves configuration and initial weights for the peer
        # The peer at its best: the setting that is fastest here.
        rates = {}
        for setting, self.peer_flags in self.peer_settings.items():
            rates[setting] = self.peer()
        best = max(rates, key=rates.get)
        self.peer_flags = self.peer_settings[best]
        self.peer_name += f" {best}, tcmalloc"

    def ours(self):
        run_dir = self.folder / "run"
        subprocess.run(["rm", "-rf", run_dir], check=True)
        run([self.bin_dir / "lockstep", "run", "-n", self.ranks, "--", self.bin_dir / "gpt", f"--run_dir={run_dir}", f"--train_data={DATA}", f"--steps={self.steps}",
             f"--global_batch_size={self.batch}", f"--micro_batch_size={self.batch // 2}", "--warmup_steps=10", "--checkpoint_initial", "--checkpoint_interval_steps=0",
             "--eval_interval_steps=0", "--learning_rate=5e-4", f"--precision={self.precision}", *self.flags, *self.layout_flags])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        self.our_losses = [line["loss"] for line in lines]
        return self.tokens / statistics.median(line["step_s"] for line in lines[WARMUP_STEPS:])

    def peer(self):
        flags = [PEER, f"--run_dir={self.folder / 'run'}", f"--data={DATA}", f"--steps={self.steps}", f"--threads={2 // self.ranks}", *self.peer_flags]
        command = ([PYTHON] if self.ranks == 1 else TORCHRUN) + flags + (["--bf16"] if self.precision == "bf16" else [])
        answer = json.loads(run(command, LD_PRELOAD=TCMALLOC, OMP_NUM_THREADS=str(2 // self.ranks)).splitlines()[-1])
        bound = 2e-2 if self.precision == "bf16" else 1e-4
        worst = max(abs(a - b) / b for a, b in zip(self.our_losses, answer["losses"]))
        assert worst < bound, f"{self.name}: losses differ by {worst}, so the two did not compute the same"
        return self.tokens / statistics.median(answer["step_s"][WARMUP_STEPS:])


class StartRow:
    """Runs a second from nothing to the end of the first training step, 2 ranks."""

    name, unit, goal, peer_name = "start/2 ranks to the end of step 1", "1/s", 4.0, "torchrun DDP"

    def __init__(self, bin_dir):
        self.bin_dir = bin_dir

    def why_not(self):
        return None

    def prepare(self, folder):
        self.folder = folder
        self.ours()
        self.peer()

    def ours(self):
        run_dir = self.folder / "run"
        subprocess.run(["rm", "-rf", run_dir], check=True)
        start = time.perf_counter()
        run([self.bin_dir / "lockstep", "run", "-n", 2, "--", self.bin_dir / "gpt", f"--run_dir={run_dir}", f"--train_data={DATA}", "--steps=1", "--global_batch_size=32", "--micro_batch_size=16",
             "--checkpoint_initial", "--eval_interval_steps=0", *SIZES["tiny"][0]])
        return 1 / (time.perf_counter() - start)

    def peer(self):
        start = time.perf_counter()
        run(TORCHRUN + [PEER, f"--run_dir={self.folder / 'run'}", f"--data={DATA}", "--steps=1"], LD_PRELOAD=TCMALLOC, OMP_NUM_THREADS="1")
        return 1 / (time.perf_counter() - start)


class StartCpuRow:
    """Ranks a CPU second brings through a run of one step, launcher, mpirun and agent included; beside it the same on 8 ranks."""

    unit, goal, peer_name = "ranks/CPU s", 1 / 1.5, "on 8 ranks"

    def __init__(self, bin_dir, ranks):
        self.bin_dir, self.ranks, self.name = bin_dir, ranks, f"start/CPU time of a rank, of {ranks}"

    def why_not(self):
        return None

    def prepare(self, folder):
        self.folder = folder
        self.ours()

    def started(self, ranks):
        run_dir = self.folder / "run"
        subprocess.run(["rm", "-rf", run_dir], check=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run([self.bin_dir / "lockstep", "run", "-n", ranks, "--", self.bin_dir / "gpt", f"--run_dir={run_dir}", f"--train_data={DATA}", "--steps=1", "--global_batch_size=64", "--micro_batch_size=1",
             "--checkpoint_interval_steps=0", "--eval_interval_steps=0", "--layers=1", "--width=32", "--heads=2", "--sequence_length=32"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return ranks / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def ours(self):
        return self.started(self.ranks)

    def peer(self):
        return self.started(8)


class AllReduceRow:
    """The ordered all-reduce of f32 on 2 ranks over shared memory, of mapped or plain tensors, beside one peer. Each side checks its sums."""

    unit, goal = "1/s", 1.0

    def __init__(self, bin_dir, bytes, memory, peer_name):
        self.program, self.bytes, self.memory, self.peer_name = bin_dir.parent / "tests/all_reduce_bench", bytes, memory, peer_name
        size = f"{bytes >> 20} MiB" if bytes >= 1 << 20 else f"{bytes >> 10} KiB" if bytes >= 1 << 10 else f"{bytes} B"
        self.name = f"all_reduce/{size}/{memory}/{peer_name}"
        if peer_name == "gloo":
            self.goal = 8.0 if memory == "mapped" else 4.0  # plain memory crosses twice: into the ring, and out of it
        elif peer_name == "Open MPI" and bytes >= 16 << 20:
            self.goal = 2.0

    def why_not(self):
        return None

    def prepare(self, folder):
        pass

    def ours(self):
        return 1e6 / float(run([*MPIRUN, self.program, self.memory, self.bytes], OMP_NUM_THREADS="1"))

    def peer(self):
        settings = ALL_REDUCE_PEERS[self.peer_name]
        if settings is None:
            return 1e6 / float(run(TORCHRUN + [ROOT / "tests/bench/peers/all_reduce_gloo.py", self.bytes], OMP_NUM_THREADS="1"))
        return 1e6 / float(run([*MPIRUN, self.program, "mpi", self.bytes], OMP_NUM_THREADS="1", **settings))


class CheckpointRow:
    """One checkpoint over 2 ranks: saved with every fsync, loaded from the page cache with every byte verified, or what a save in the background holds training up for.
    NO_CHECKSUMS is the same program with a CRC32C that is always zero: what checksums cost."""

    NO_CHECKSUMS = "ours without checksums"
    unit = "1/s"
    peers = {
        "save": {"plain writer": ("write", 0.9), NO_CHECKSUMS: ("save", 1 / 1.05), "PyTorch DCP": ("save", 1.0)},
        "load": {"plain pread": ("read", 0.8), NO_CHECKSUMS: ("load", 1 / 1.05), "PyTorch DCP": ("load", 2.0)},
        "stall": {"memcpy": ("copy", 1 / 1.1), "PyTorch DCP": ("stall", 1.0)},
    }

    def __init__(self, bin_dir, gib, what, peer_name):
        self.program, self.bytes, self.what, self.peer_name = bin_dir.parent / "tests/checkpoint_bench", gib << 30, what, peer_name
        self.peer_what, self.goal = self.peers[what][peer_name]
        self.name = f"checkpoint/{gib} GiB/{what}/{peer_name}"
        ours = [*MPIRUN, self.program]
        self.peer_command, self.peer_folder = {
            "PyTorch DCP": ([*TORCHRUN, ROOT / "tests/bench/peers/checkpoint_dcp.py"], "peer"),
            self.NO_CHECKSUMS: ([*MPIRUN, bin_dir.parent / "tests/checkpoint_unchecked_bench"], "peer"),
        }.get(peer_name, (ours, "ours"))

    def rounds(self, asked):
        return max(asked, 15 if self.peer_name == self.NO_CHECKSUMS else 7)  # storage is the noisiest of all, and there a few percent are looked for

    def why_not(self):
        free = shutil.disk_usage(tempfile.gettempdir()).free
        return f"{free >> 30} GiB are free in {tempfile.gettempdir()}" if free < 4 * self.bytes else None

    def prepare(self, folder):
        self.folder = folder
        if self.what == "load":
            run([*MPIRUN, self.program, "save", self.bytes, folder / "ours"], OMP_NUM_THREADS="1")
            if self.peer_folder != "ours":
                run([*self.peer_command, "save", self.bytes, folder / self.peer_folder], OMP_NUM_THREADS="1")

    def timed(self, command, folder):
        folder.mkdir(exist_ok=True)
        seconds = float(run([*command, self.bytes, folder], OMP_NUM_THREADS="1").split()[-1])
        if self.what != "load":
            shutil.rmtree(folder)
        return 1 / seconds

    def ours(self):
        return self.timed([*MPIRUN, self.program, self.what], self.folder / "ours")

    def peer(self):
        return self.timed([*self.peer_command, self.peer_what], self.folder / self.peer_folder)


class OverlapRow:
    """How much of the communication hides behind compute, of all of it: 2 ranks over a link that takes half as long as the compute."""

    unit, peer_name = "share", "all"

    def __init__(self, bin_dir, case, goal):
        self.program, self.case, self.goal, self.name = bin_dir.parent / "tests/overlap_bench", case, goal, f"overlap/{case}"

    def rounds(self, asked):
        return 1  # the program takes its own three

    def why_not(self):
        return None

    def prepare(self, folder):
        self.folder = folder

    def ours(self):
        said = run([self.program, self.case, self.folder], OMP_NUM_THREADS="1")
        return statistics.median(float(share) for share in re.findall(r"hidden (-?\d+) %", said)) / 100

    def peer(self):
        return 1.0


# Of several micro-batches ZeRO-1 has the first one's forward to hide its gather behind and the last one's backward for its reduction: with two of this
# model two thirds of the bytes at most.
OVERLAP_GOALS = {"zero1-1": 0.6, "zero1-2": 0.45, "zero3-1": 0.6, "zero3-2": 0.6}


def measure(row, rounds):
    with tempfile.TemporaryDirectory() as folder:
        row.prepare(pathlib.Path(folder))
        ours, peers = [], []
        for number in range(row.rounds(rounds) if hasattr(row, "rounds") else rounds):
            for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                (ours if side == "ours" else peers).append(getattr(row, side)())
    ratios = [a / b for a, b in zip(ours, peers)]
    ratio = statistics.median(ratios)
    return {"name": row.name, "unit": row.unit, "ours": statistics.median(ours), "peer": statistics.median(peers), "peer_name": row.peer_name, "ratio": ratio, "goal": row.goal,
            "met": ratio >= row.goal, "spread": [min(ratios), max(ratios)]}


def all_rows(bin_dir):
    rows = [TrainingRow(bin_dir, size, precision, layout) for size in SIZES for precision in ("fp32", "bf16") for layout in ("1 process", "2 ranks")]
    rows += [TrainingRow(bin_dir, *row) for row in PARALLEL_ROWS] + [StartRow(bin_dir)] + [StartCpuRow(bin_dir, ranks) for ranks in (2, 32, 64)]
    rows += [OverlapRow(bin_dir, case, goal) for case, goal in OVERLAP_GOALS.items()]
    rows += [AllReduceRow(bin_dir, bytes, memory, peer) for bytes in ALL_REDUCE_BYTES for memory in ("mapped", "plain") for peer in ALL_REDUCE_PEERS]
    rows += [CheckpointRow(bin_dir, gib, what, peer) for gib in (1, 4) for what, peers in CheckpointRow.peers.items() for peer in peers]
    return rows


def summary(results, skipped):
    """What was reached in a line, and the exit code."""
    missed = [f"{result['name']} ({result['ratio']:.2f} of {result['goal']:.2f})" for result in results if not result["met"]]
    line = f"{len(results) - len(missed)} of {len(results)} goals met, {skipped} rows skipped" + (f"; missed: {', '.join(missed)}" if missed else "")
    return line, 1 if missed or not results else 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="*", help="names to run, with * and ?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bin_dir", type=pathlib.Path, default=ROOT / "build/release/bin")
    arguments = parser.parse_args()
    bin_dir = arguments.bin_dir.resolve()
    results, skipped = [], 0
    print(f"{'row':46} {'ours':>10} {'peer':>10} {'ratio':>6}  spread       goal          peer")
    for row in all_rows(bin_dir):
        if not fnmatch.fnmatch(row.name, arguments.rows):
            continue
        if reason := row.why_not():
            print(f"{row.name:46} skipped: {reason}", flush=True)
            skipped += 1
            continue
        result = measure(row, arguments.rounds)
        results.append(result)
        print(f"{result['name']:46} {result['ours']:10.5g} {result['peer']:10.5g} {result['ratio']:6.2f}  {result['spread'][0]:.2f}-{result['spread'][1]:.2f}  {result['goal']:6.2f} {'met   ' if result['met'] else 'MISSED'}  {result['peer_name']}", flush=True)
    (ROOT / "build/bench.json").write_text(json.dumps(results, indent=1) + "\n")
    line, code = summary(results, skipped)
    print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
