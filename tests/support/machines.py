"""Hosts of cluster/lab, and memory limits, for the Python tests. Both need root."""

import os
import pathlib
import subprocess
import sys
import time

HOSTS_SH = pathlib.Path(__file__).parents[2] / "cluster" / "lab" / "hosts.sh"


def lab(test, *words):
    """hosts.sh with these words, one slot a host; where there can be no such hosts the test is skipped by its name."""
    done = subprocess.run([str(HOSTS_SH), *words], capture_output=True, text=True, env={**os.environ, "SLOTS": "1"})
    if done.returncode == 77:
        print(f"SKIPPED: {test}: {done.stderr.strip()}")
        sys.exit(77)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class MemoryLimit:
    """A control group of version 1 or 2: its processes may allocate so many bytes from when they join. OSError: there can be none here."""

    def __init__(self, bytes):
        one, two = pathlib.Path("/sys/fs/cgroup/memory"), pathlib.Path("/sys/fs/cgroup")
        base, limit, swap = (one, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if one.is_dir() else (two, "memory.max", "memory.swap.max")
        self.path = base / f"lockstep-test-{os.getpid()}"
        self.path.mkdir()
        try:
            (self.path / limit).write_text(str(bytes))
            if (self.path / swap).exists():
                (self.path / swap).write_text(str(bytes if one.is_dir() else 0))
        except OSError:
            self.path.rmdir()
            raise

    def join(self, pid=None):
        (self.path / "cgroup.procs").write_text(str(pid or os.getpid()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _ in range(200):
            try:
                return self.path.rmdir()
            except OSError:  # what was in it still ends
                time.sleep(0.02)
        self.path.rmdir()


def why_no_memory_limit():
    """None: there can be one here."""
    try:
        with MemoryLimit(1 << 30):
            return None
    except OSError as error:
        return f"no memory control group: {error}"
