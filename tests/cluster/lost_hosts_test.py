"""lost_hosts_test.py BIN_DIR: four hosts of cluster/lab train under one `lockstep run --min_ranks`. A rank is killed, a host crashes, another falls
silent, one comes back, and the host of rank 0 crashes: each time the job goes on by itself in the largest world of the hosts that are left, and it ends
with the bits of one process that was left alone. Needs root."""

import functools
import os
import pathlib
import random
import signal
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import machines
import runs

STEPS = 400
FLAGS = [f"--steps={STEPS}", "--checkpoint_interval_steps=3", "--keep_checkpoints=1000", "--eval_interval_steps=0", "--layers=2", "--width=48", "--heads=3", "--sequence_length=64",
         "--global_batch_size=32", "--micro_batch_size=4", "--warmup_steps=5", "--log_interval_steps=1"]


lab = functools.partial(machines.lab, "lost_hosts")


def disturb(job, run_dir, what, deed, expected_map, limit_s):
    """Does `deed` once training has made progress; the next start's map of ranks must be as expected, and it must train."""
    durable = runs.durable_step(run_dir)
    job.until(lambda: runs.durable_step(run_dir) > durable + 3, f"{what}: training makes progress")
    at = time.monotonic()
    deed()
    mapped = job.until(lambda: job.when(r"^lockstep: ranks? ", at), f"{what}: a new start")
    told = next(line for when, line in job.lines if when == mapped)
    assert told.startswith(f"lockstep: {expected_map}"), f"{what}: {told}, expected {expected_map}"
    step = job.until(lambda: job.when(r"^\s*step \d+/", mapped), f"{what}: a new step")
    print(f"{what}: {told.strip()[10:]}, started after {mapped - at:.1f} s, first step after {step - at:.1f} s", flush=True)
    assert mapped - at < limit_s, f"{what}: found after {mapped - at:.1f} s, not {limit_s}"


def agent_of_rank(rank, run_dir):
    for process in pathlib.Path("/proc").iterdir():
        try:
            if b"\0agent\0" in (process / "cmdline").read_bytes() and f"\0OMPI_COMM_WORLD_RANK={rank}\0".encode() in (told := (process / "environ").read_bytes()):
                if f"={run_dir}/".encode() in told:
                    return int(process.name)
        except OSError:  # no process, or it ended meanwhile
            continue
    raise AssertionError(f"rank {rank} has no agent")


def crash_beside_slow_agent(home, run_dir):
    """n2 crashes, and for a second the agent of n1 has no processor: it lives, so its host is not lost."""
    slow = agent_of_rank(0, run_dir)
    os.kill(slow, signal.SIGSTOP)
    threading.Timer(1, os.kill, (slow, signal.SIGCONT)).start()
    lab("crash", home, "n2")


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 40_000)
        flags = [f"--train_data={folder / 'train.bin'}", *FLAGS]
        home = lab("up", "4")
        try:
            runs.run(bin_dir, "gpt", 1, folder / "alone", flags)
            run_dir = folder / "run"
            words = runs.command(bin_dir, "gpt", 4, run_dir, flags, ["--hostfile", f"{home}/hostfile", "--min_ranks=2", "--restarts=10"])
            job = runs.Job([str(machines.HOSTS_SH), "exec", home, "head", *words], OMPI_MCA_plm_rsh_agent=f"{home}/rsh")
            try:
                kill = lambda: os.kill(random.choice(runs.processes_of(run_dir, "gpt")), signal.SIGKILL)
                disturb(job, run_dir, "a rank is killed", kill, "ranks 0 on n1, 1 on n2, 2 on n3, 3 on n4", 20)
                disturb(job, run_dir, "a host crashes while another's agent is slow", lambda: crash_beside_slow_agent(home, run_dir), "ranks 0 on n1, 1 on n3, 2 on n4; not used: n2", 20)
                disturb(job, run_dir, "a host falls silent", lambda: lab("cut", home, "n4"), "ranks 0 on n1, 1 on n3; not used: n2, n4", 30)
                lab("boot", home, "n2")
                disturb(job, run_dir, "rank 0's host crashes, another is back", lambda: lab("crash", home, "n1"), "ranks 0 on n2, 1 on n3; not used: n1, n4", 20)
                code = job.wait()
                assert code == 0, f"exit {code}:\n{job.said()[-4000:]}"
            finally:
                job.end()
            runs.expect_nothing_lost(run_dir)
            assert runs.digests(bin_dir, run_dir) == runs.digests(bin_dir, folder / "alone")
            assert runs.losses(run_dir) == runs.losses(folder / "alone"), "losses differ"
        finally:
            lab("down", home)


if __name__ == "__main__":
    main()
