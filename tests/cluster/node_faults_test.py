"""node_faults_test.py BIN_DIR: four hosts of cluster/lab train under one `lockstep run --hang_timeout_s=3`, while ranks are stopped, killed and run out
of memory, and hosts are cut off and crash. Each must be found within T and a second, by what the agents of all hosts tell the supervisor, with the
rank or host that is at fault; the job goes on by itself and ends with the bits of one process that was left alone. 10 faults, 40 with LOCKSTEP_DEEP.
Needs root, and a memory control group for one of the faults."""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import machines
import runs

FAULTS = 40 if os.environ.get("LOCKSTEP_DEEP") == "1" else 10
SEED = int(os.environ.get("SEED", "7"))
T = 3.0
STEPS_A_FAULT = 60
MAP = r"^lockstep: ranks? \d+ on "  # the line before a start
FLAGS = ["--checkpoint_interval_steps=3", "--keep_checkpoints=1000", "--eval_interval_steps=0", "--layers=2", "--width=48", "--heads=3", "--sequence_length=64",
         "--global_batch_size=32", "--micro_batch_size=4", "--warmup_steps=5", "--log_interval_steps=1"]


lab = functools.partial(machines.lab, "node_faults")


def ranks_of(run_dir):
    """Rank to pid."""
    found = {}
    for pid in runs.processes_of(run_dir, "gpt"):
        try:
            environment = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found.update({int(word.split(b"=")[1]): pid for word in environment if word.startswith(b"OMPI_COMM_WORLD_RANK=")})
    return found


def is_dead(pid):
    try:
        return ") Z " in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # gone
        return True


def placement(told):
    """"lockstep: ranks 0 on n1, 1 on n3": rank to host."""
    return {int(rank): host for rank, host in re.findall(r"(\d+) on (\w+)", told.split(";")[0])}


class Faults:
    def __init__(self, home, run_dir, job, memory):
        self.home, self.run_dir, self.job, self.memory = home, run_dir, job, memory
        self.took = {}

    def training(self, since):
        """The ranks' places, once the start after `since` makes progress."""
        mapped = self.job.until(lambda: self.job.when(MAP, since), "a start")
        durable = runs.durable_step(self.run_dir)
        self.job.until(lambda: self.job.step(mapped) and runs.durable_step(self.run_dir) > durable + 3, "training makes progress")
        return placement(next(line for when, line in self.job.lines if when == mapped))

    def inflict(self, kind, generator, since):
        """Returns the time at which it was found."""
        places = self.training(since)
        rank = generator.choice(sorted(places))
        host, before = places[rank], set(self.run_dir.glob("hang-*.json"))
        time.sleep(generator.uniform(0, 0.2))
        pid = ranks_of(self.run_dir).get(rank)
        assert pid, f"rank {rank} of {places} is not there"
        token = next(self.run_dir.glob("launch/*/agents"))
        assert token.stat().st_mode & 0o777 == 0o600, oct(token.stat().st_mode)
        secret = token.read_text().split()[-1]
        assert len(secret) == 64 and secret not in self.job.said(), "the token is in the log"
        at = time.monotonic()
        {"stop": lambda: os.kill(pid, signal.SIGSTOP), "kill": lambda: os.kill(pid, signal.SIGKILL), "memory": lambda: self.memory.join(pid),
         "cut": lambda: lab("cut", self.home, host), "crash": lambda: lab("crash", self.home, host)}[kind]()
        name = f"{kind} of rank {rank} on {host} in a world of {len(places)}"
        if kind == "memory":  # the kernel looks for memory before it ends a process
            self.job.until(lambda: is_dead(pid), f"{name}: the kernel ends it", 30)
        happened = time.monotonic() if kind == "memory" else at
        said = {"stop": rf"^lockstep: rank {rank} \(host {host}, pid \d+\) is stopped", "kill": rf"^lockstep: first failure: rank {rank} on {host} died by signal 9",
                "memory": rf"^lockstep: first failure: rank {rank} on {host} died by signal 9",
                "cut": rf"^lockstep: host {host} is silent", "crash": rf"^lockstep: (first failure: )?host {host} is silent"}[kind]
        wrong = lambda: self.job.when(rf"{MAP}|^lockstep: starting again", at)
        self.job.until(lambda: self.job.when(said, at) or wrong(), f"{name} is found", 30)
        found = self.job.when(said, at)
        assert found, f"{name}: not named:\n" + "".join(line for when, line in self.job.lines if when >= at)
        if kind == "memory":
            want = f"the kernel ended a process of host {host} for want of memory"
            self.job.until(lambda: self.job.when(want, at) or self.job.when(MAP, at), name)
            assert self.job.when(want, at), f"{name}: not for want of memory:\n" + "".join(line for when, line in self.job.lines if when >= at)
        if kind in ("cut", "crash"):
            lab({"cut": "heal", "crash": "boot"}[kind], self.home, host)
        self.job.until(lambda: self.job.when(MAP, at), f"{name}: the next start")
        records = set(self.run_dir.glob("hang-*.json")) - before
        assert len(records) == 1, f"{name}: records {records}:\n" + "".join(line for when, line in self.job.lines if when >= at)
        record = json.loads(records.pop().read_text())
        cause = {"stop": "never_arrived", "kill": "gone", "memory": "gone", "cut": "all_arrived", "crash": "all_arrived"}[kind]
        verdict = (record["cause"], record["culprits"], record["hosts"])
        assert verdict == (cause, [rank], [host]), f"{name}: {verdict}, {record['message']}"
        next_places = placement(next(line for when, line in self.job.lines if when >= at and re.search(MAP, line)))
        assert (host in next_places.values()) == (kind not in ("cut", "crash")), f"{name}: then {next_places}"
        took = max(0.0, found - happened)
        self.took.setdefault(kind, []).append(took)
        again = self.job.when(MAP, at) - at
        print(f"{name}: found after {took:.2f} s, started again after {again:.2f} s", flush=True)
        return at


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    generator = random.Random(SEED)
    kinds = ["stop", "cut", "kill", "crash", "memory"]
    if why := machines.why_no_memory_limit():
        print(f"SKIPPED: node_faults memory: {why}")
        kinds.remove("memory")
    with contextlib.nullcontext() if why else machines.MemoryLimit(256 << 10) as memory, tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 40_000)
        flags = [f"--train_data={folder / 'train.bin'}", f"--steps={STEPS_A_FAULT * FAULTS}", *FLAGS]
        home = lab("up", "4")
        try:
            run_dir = folder / "run"
            words = runs.command(bin_dir, "gpt", 4, run_dir, [*flags, f"--hang_timeout_s={T}"], ["--hostfile", f"{home}/hostfile", "--min_ranks=2", "--restarts=10"])
            job = runs.Job([str(machines.HOSTS_SH), "exec", home, "head", *words], OMPI_MCA_plm_rsh_agent=f"{home}/rsh")
            try:
                faults, at = Faults(home, run_dir, job, memory), 0.0
                for number in range(FAULTS):
                    at = faults.inflict(kinds[number % len(kinds)], generator, at)
                code = job.wait()
                assert code == 0, f"exit {code}:\n{job.said()[-4000:]}"
            finally:
                job.end()
            runs.run(bin_dir, "gpt", 1, folder / "alone", flags)
            runs.expect_nothing_lost(run_dir)
            told = [event["record"] for event in runs.events(run_dir) if event["event"] == "hang"]
            assert sorted(told) == sorted(path.name for path in run_dir.glob("hang-*.json")) and len(told) == FAULTS, f"the ledger has {told}"
            left = list(run_dir.glob("launch/*"))
            assert not left, f"left in the run directory: {left}"
            assert runs.digests(bin_dir, run_dir) == runs.digests(bin_dir, folder / "alone")
            assert runs.losses(run_dir) == runs.losses(folder / "alone"), "losses differ"
            for kind, took in sorted(faults.took.items()):
                print(f"{kind}: found after {', '.join(f'{seconds:.2f}' for seconds in took)} s")
                late = [seconds for seconds in took if seconds > T + 1]
                assert not late, f"{kind}: found after {late} s, later than {T + 1} s"
        finally:
            lab("down", home)


if __name__ == "__main__":
    main()
