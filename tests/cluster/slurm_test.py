"""slurm_test.py BIN_DIR: `lockstep submit` on a real Slurm of three nodes. Preempted, requeued, cancelled or with a node lost, the run
goes on to the same bits as one that was left alone. The cases run side by side, each on a cluster of its own."""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

ROOT = pathlib.Path(__file__).parents[2]
NODES = 3
STEPS = 400
# Slow because of what each step saves and waits for, not by what it computes: five of these share the machine with other tests.
FLAGS = [f"--steps={STEPS}", "--checkpoint_interval_steps=1", "--asynchronous_save=false", "--eval_interval_steps=0", "--layers=1", "--width=32", "--heads=2", "--sequence_length=32", "--global_batch_size=6",
         "--micro_batch_size=2", "--warmup_steps=5", "--log_interval_steps=1000"]


class Skipped(Exception):
    pass


class Cluster:
    """A Slurm of cluster/lab, nodes of one CPU; `settings` are slurm.sh's variables."""

    def __init__(self, bin_dir, folder, nodes=NODES, **settings):
        self.bin_dir, self.folder, self.script = bin_dir, folder, str(ROOT / "cluster/lab/slurm.sh")
        up = subprocess.run([self.script, "up", str(nodes), "1"], capture_output=True, text=True, env={**os.environ, **settings})
        if up.returncode == 77:
            raise Skipped(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        self.lab = up.stdout.strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lab_does("down")

    def lab_does(self, verb, *words):
        done = subprocess.run([self.script, verb, self.lab, *words], capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, f"{verb} {words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def do(self, *words):
        return self.lab_does("exec", *words)

    def submit(self, *words):
        return self.do(str(self.bin_dir / "lockstep"), "submit", *words)

    def until(self, job, words, seconds=180):
        """The job, once Slurm says so of it; two of its lines may be joined by .* (a regular expression)."""
        return self.lab_does("wait", job, str(seconds), words)


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    path.chmod(0o755)


class Run:
    """gpt on all nodes of a cluster, in a run directory of its own."""

    def __init__(self, folder, cluster, name, *options):
        self.cluster, self.folder, self.run_dir, self.options = cluster, folder, folder / name, options

    def submit(self):
        return self.cluster.submit(f"--nodes={NODES}", *self.options, "--", str(self.cluster.bin_dir / "gpt"), f"--run_dir={self.run_dir}",
                                   f"--train_data={self.folder / 'train.bin'}", *FLAGS)

    def submit_and_wait(self, step):
        """The job, in the midst of its run."""
        job, deadline = self.submit(), time.monotonic() + 180
        while self.durable() < step:
            assert time.monotonic() < deadline, f"not at step {step}:\n{self.cluster.do('scontrol', 'show', 'job', job)}\n{self.said()}"
            time.sleep(0.02)
        return job

    def durable(self):
        with contextlib.suppress(FileNotFoundError):
            return (self.run_dir / "ledger.jsonl").read_text().count('"durable"')
        return 0

    def said(self):
        lines = "".join(path.read_text() for path in sorted(self.run_dir.glob("slurm-*.out"))).splitlines()
        return "\n".join([line for line in lines if "durable after" not in line][-40:])

    def finish(self, job, restarts):
        said = self.cluster.until(job, "JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT) ")
        assert re.search(f"JobState=COMPLETED .*Restarts={restarts} .*ExitCode=0:0", said, re.DOTALL), f"{said}\n{self.said()}"
        return said

    def check(self, expected, saved):
        """Same bits; and where there was time to save, nothing was computed twice."""
        found = runs.digests(self.cluster.bin_dir, self.run_dir), runs.losses(self.run_dir)
        assert found == expected, f"{self.run_dir.name}: {found[0]}, expected {expected[0]}, or losses differ:\n{self.said()}"
        events = runs.events(self.run_dir)
        stops, resumes = ([event["step"] for event in events if event["event"] == kind] for kind in ("preempted", "resume"))
        assert len(resumes) == 1 and stops == (resumes if saved else []), f"{self.run_dir.name}: stopped at {stops}, went on at {resumes}\n{self.said()}"
        return f"{self.run_dir.name}: went on from step {resumes[0]}, same bits"


def preempted(bin_dir, folder, expected):
    """A job of higher priority comes: USR1 to the batch script, 75, back into the queue."""
    with Cluster(bin_dir, folder) as cluster:
        run = Run(folder, cluster, "preempted", "--partition=low")
        job = run.submit_and_wait(step=20)
        cluster.do("sbatch", "--parsable", "-p", "high", f"-N{NODES}", "-o", "/dev/null", "--wrap", "exit 0")
        run.finish(job, restarts=1)
        # The shell of salloc is not on the node it gets.
        ran_on = cluster.do("salloc", "-N1", str(bin_dir / "lockstep"), "run", "-n", "1", "--", "/bin/hostname")
        assert ran_on in {f"n{node}" for node in range(1, NODES + 1)}, f"lockstep run in salloc ran on {ran_on}"
        return run.check(expected(), saved=True)


def requeued(bin_dir, folder, expected):
    """TERM to everything, back into the queue; on a cluster that requeues nothing by exit code."""
    with Cluster(bin_dir, folder, REQUEUE_EXIT="") as cluster:
        run = Run(folder, cluster, "requeued")
        job = run.submit_and_wait(step=20)
        cluster.do("scontrol", "requeue", job)
        run.finish(job, restarts=1)
        return run.check(expected(), saved=True)


def small_jobs(bin_dir, folder, expected):
    """Without training: 75 is requeued as often as was said, each task of an array has a run of its own, the warning comes before the time limit."""
    with Cluster(bin_dir, folder) as cluster:
        script(folder / "task.sh", 'echo "$1"')
        script(folder / "waits.sh", '[ -z "$SLURM_RESTART_COUNT" ] || exit 0', 'trap "exit 75" USR1', "while :; do sleep 0.1; done")
        # Asks the batch script, lockstep's parent, to stop, as Slurm does; then stops as a run does.
        script(folder / "stops.sh", "trap 'exit 75' USR1", 'echo {} > "$LOCKSTEP_LAUNCH_DIR/ready"', "kill -USR1 $(ps -o ppid= $PPID)", "while :; do sleep 0.1; done")
        warned = cluster.submit("--time=1", "--grace_s=45", "--job_name=warned", "--", "./waits.sh")
        again = cluster.submit("--max_requeues=1", "--job_name=again", "--", "./stops.sh")
        tasks = cluster.submit("--array=3-4", "--job_name=tasks", "--", "./task.sh", "it's %a", "--run_dir=%a")
        for task in "3", "4":
            cluster.until(f"{tasks}_{task}", "JobState=COMPLETED ")
            assert f"it's {task}\n" in (folder / f"slurm-{tasks}_{task}.out").read_text()
        cluster.until(again, "JobState=FAILED .*Restarts=1 .*ExitCode=77:0")
        cluster.until(warned, "JobState=COMPLETED .*Restarts=1 ")
        return "small jobs: requeued in their budget, at the time limit, as tasks of an array"


def cancelled(bin_dir, folder, expected):
    """scancel: TERM to everything; the run saves, the job stays cancelled; a new one goes on."""
    with Cluster(bin_dir, folder) as cluster:
        run = Run(folder, cluster, "cancelled")
        job = run.submit_and_wait(step=20)
        cluster.do("scancel", job)
        cluster.until(job, "JobState=CANCELLED .*Restarts=0 .*ExitCode=75:0")
        run.finish(run.submit(), restarts=0)
        return run.check(expected(), saved=True)


def node_lost(bin_dir, folder, expected):
    """A node goes silent: the job goes on from the last checkpoint, on the nodes that are left."""
    with Cluster(bin_dir, folder, nodes=NODES + 1, SLURMD_TIMEOUT="4") as cluster:
        run = Run(folder, cluster, "node_lost")
        job = run.submit_and_wait(step=60)
        assert "NodeList=n[1-3]" in cluster.until(job, "JobState=RUNNING")
        cluster.lab_does("crash", "n2")
        assert re.search(r"NodeList=n\[1,3-4\]", run.finish(job, restarts="[12]"))
        return run.check(expected(), saved=False)


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    wanted = sys.argv[2:]
    cases = [case for case in (node_lost, small_jobs, preempted, requeued, cancelled) if not wanted or case.__name__ in wanted]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 20_000)
        left_alone = None

        def expected():
            return left_alone.result()

        def leave_alone():
            flags = [f"--train_data={folder / 'train.bin'}", *FLAGS, "--checkpoint_interval_steps=1000"]
            runs.run(bin_dir, "gpt", 2, folder / "alone", flags)  # on another number of ranks: not a bit differs
            return runs.digests(bin_dir, folder / "alone"), runs.losses(folder / "alone")

        start = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(1) as alone:
            left_alone = alone.submit(leave_alone)
            try:
                for done in concurrent.futures.as_completed([pool.submit(case, bin_dir, folder, expected) for case in cases]):
                    print(f"{time.monotonic() - start:5.1f} s  {done.result()}", flush=True)
            except Skipped as reason:
                print(f"SKIPPED: slurm: {reason}")
                sys.exit(77)


if __name__ == "__main__":
    main()
