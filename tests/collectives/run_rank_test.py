"""run_rank_test.py PROGRAM MPIRUN: run_rank from the outside, on real ranks: exit codes by kind of error, one ERROR, nobody left behind, requests
to stop."""

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

PROGRAM, MPIRUN = sys.argv[1:3]


class Job:
    """Ranks doing a deed, to be waited for; ranks 0: the program alone, without mpirun. What it leaves running is ended."""

    def __init__(self, deed, ranks=2, who=None, **environment):
        self.folder = tempfile.TemporaryDirectory()
        words = [PROGRAM, deed, self.folder.name] + ([str(who)] if who is not None else [])
        self.name, self.ranks = f"{deed} of {who} on {ranks} {environment}", ranks
        self.process = subprocess.Popen(([MPIRUN, str(ranks)] if ranks else []) + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, "LOCKSTEP_AGENT": "none", **environment})  # no hang here is to be found

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.pids():
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()

    def pids(self):
        return [int(text) for path in pathlib.Path(self.folder.name).glob("pid.*") if (text := path.read_text()).endswith("\n")]

    def wait_for_ranks(self):
        wait_until(lambda: len(self.pids()) == max(1, self.ranks), 60, f"{self.name}: not all ranks came")

    def end(self, expect, seconds=60):
        """Exit code as expected and no rank left; returns what was said."""
        out, err = self.process.communicate(timeout=seconds)
        assert self.process.returncode == expect, f"{self.name}: exit code {self.process.returncode}, not {expect}\n{out}{err}"
        wait_until(lambda: not any(map(is_running, self.pids())), 5, f"{self.name}: a rank is still there")
        return out + err


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_so, seconds, complaint):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def test_each_kind_of_error_has_its_exit_code():
    kinds = {"config": (78, "a flag is wrong"), "data": (65, "a shard is torn"), "storage": (74, "writing '/full/disk': No space left"),
             "peer": (75, "a peer went away"), "hang": (76, "all_reduce hangs"), "fenced": (73, "a newer start"), "check": (70, "bucket 3"),
             "standard": (70, "nobody foresaw"), "torch": (70, "shape '[3]'"), "number": (70, "unknown type")}
    for deed, (code, words) in kinds.items():
        with Job(deed, ranks=0) as job:
            said = job.end(code)
            assert said.count(words) == 1, f"{job.name}: '{words}' is said {said.count(words)} times\n{said}"
            assert "Exception raised from" not in said, f"a backtrace of LibTorch's own frames\n{said}"


def test_an_error_of_one_rank_ends_those_that_wait_for_it():
    for deed, code, words in (("config", 78, "a flag is wrong"), ("data", 65, "a shard is torn"), ("standard", 70, "nobody foresaw")):
        with Job(deed, 3, who=1) as job:
            said = job.end(code)
            assert said.count(words) == 1, f"{job.name}: '{words}' is said {said.count(words)} times\n{said}"
            assert "[rank 1/3]" in next(line for line in said.splitlines() if words in line), said


def test_a_mistake_all_ranks_share_is_said_once():
    with Job("config", 3) as job:
        assert job.end(78).count("a flag is wrong") == 1
    for name, value in {"DEVICE": "abacus", "BACKEND": "carrier_pigeon"}.items():
        with Job("say", 3, **{name: value}) as job:
            said = job.end(78)
            assert said.count(f"--{name.lower()}={value} is neither") == 1, said


def test_so_is_one_before_the_ranks_have_met():
    for ranks, who in ((0, None), (3, None), (3, 1)):
        with Job("flags", ranks, who) as job:
            assert job.end(78).count("a flag is wrong") == 1


def test_other_errors_are_each_ranks_own_news():
    with Job("data", 2) as job:
        assert "a shard is torn" in job.end(65)


def test_the_bodys_number_is_the_exit_code():
    for ranks in (0, 2):
        for deed, code in {"return": 0, "return9": 9}.items():
            with Job(deed, ranks) as job:
                job.end(code)


def test_a_rank_alone_needs_no_mpi_and_ranks_know_each_other():
    with Job("say", 0) as job:
        assert "rank 0 of 1 on local, cpu" in job.end(0)
    for asked, got in {"auto": "shm", "shm": "shm", "mpi": "mpi"}.items():  # three ranks of one node
        with Job("say", 3, BACKEND=asked) as job:
            said = job.end(0)
            for rank in range(3):
                assert said.count(f"rank {rank} of 3 on {got}, cpu") == 1, said


def test_ranks_without_mpi_are_refused():
    with Job("say", 0, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2") as job:
        assert "Mend" in job.end(78)


def test_both_signals_request_a_stop_and_kill_nobody():
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for ranks in (0, 2):
            with Job("stop", ranks) as job:
                job.wait_for_ranks()
                for pid in job.pids():
                    os.kill(pid, number)
                job.end(0)
                assert len(list(pathlib.Path(job.folder.name).glob("stopped.*"))) == max(1, ranks)


def test_a_killed_rank_takes_the_job_down():
    with Job("stop", 3) as job:
        job.wait_for_ranks()
        os.kill(job.pids()[0], signal.SIGKILL)
        job.process.communicate(timeout=60)
        assert job.process.returncode != 0
        wait_until(lambda: not any(map(is_running, job.pids())), 10, "a rank is still there")


def test_killed_ranks_leave_no_shared_memory_behind():
    # The back end's has no name. Flight rings do, for hang_test.py to look at; what else is in /dev/shm meanwhile is MPI's, which its
    # mpirun clears away or not.
    def ours():
        return [path.name for path in pathlib.Path("/dev/shm").iterdir() if "lockstep" in path.name and not path.name.startswith("lockstep-")]

    before = memory_in_use()
    for _ in range(3):
        with Job("map", 3) as job:  # 64 MiB a rank
            job.wait_for_ranks()
            maps = "".join(pathlib.Path(f"/proc/{pid}/maps").read_text() for pid in job.pids())
            assert maps.count("/memfd:lockstep") >= 9 and "/dev/shm/lockstep" not in maps, maps
            assert not ours()
            for pid in job.pids():
                os.kill(pid, signal.SIGKILL)
            job.process.communicate(timeout=60)
        assert not ours()
    assert memory_in_use() < before + (100 << 10), "shared memory outlives its ranks"


def memory_in_use():  # KiB of shared memory on the machine
    return int(next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:")).split()[1])


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            start = time.monotonic()
            test()
            print(f"ok: {name[5:]} ({time.monotonic() - start:.1f} s)", flush=True)
