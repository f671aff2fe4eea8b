#!/usr/bin/env python3
"""system_calls_test.py WRITER LOCKSTEP: the real calls of four saves on 3 ranks fail, one at a time, by strace.

Whatever fails, what is left are whole checkpoints, the message names the file and the error, and nothing half-written lies about. Exit code 77:
skipped, because strace is missing or may not trace.
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

WRITER, LOCKSTEP = sys.argv[1:3]
FAULTS = [  # system call, its error, whether a save gets along without it
    ("fdatasync", "EIO", False),
    ("fsync", "EIO", False),
    ("fallocate", "ENOSPC", False),
    ("fallocate", "EOPNOTSUPP", True),
    ("pwrite64", "EDQUOT", False),
    ("pwrite64", "EINTR", True),
    ("renameat2", "EROFS", False),
    ("renameat2", "EINVAL", True),  # a file system without RENAME_NOREPLACE
    ("mkdir", "EROFS", False),
]
CALLS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89] if os.environ.get("LOCKSTEP_DEEP") else [1, 3, 8, 21]
SAVES = 4


def save(run_dir, inject, keep=10):
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={inject.split(':')[0]}", "-e", f"inject={inject}", WRITER, run_dir, str(keep)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def whole_checkpoints(run_dir):
    folders = sorted((run_dir / "checkpoints").iterdir()) if (run_dir / "checkpoints").exists() else []
    for folder in folders:
        verdict = subprocess.run([LOCKSTEP, "verify", folder], capture_output=True, text=True)
        assert verdict.returncode == 0, f"{folder} was left behind and is not good: {verdict.stderr}"
    return len(folders)


def main():
    if not shutil.which("strace"):
        print("SKIPPED: checkpoint_system_calls needs strace; cmake/setup.sh test installs it")
        sys.exit(77)
    failed = ignored = 0
    with tempfile.TemporaryDirectory() as folder:
        if save(pathlib.Path(folder) / "probe", "fdatasync:delay_enter=1:when=1").returncode != 0:
            print("SKIPPED: checkpoint_system_calls: strace may not trace here")
            sys.exit(77)
        run_dir = pathlib.Path(folder) / "no_noreplace"  # NFS, Lustre, 9p and FUSE know renaming, but not without replacing
        run = save(run_dir, "renameat2:error=EINVAL", keep=2)
        kept = whole_checkpoints(run_dir)
        assert run.returncode == 0 and kept == 2 and "failed" not in run.stderr, (kept, run.stderr[-1000:])
        for call, error, is_harmless in FAULTS:
            for number in CALLS:
                run_dir = pathlib.Path(folder) / f"{call}-{error}-{number}"
                run = save(run_dir, f"{call}:error={error}:when={number}")
                where = f"{call} number {number} with {error}: {run.stderr[-1000:]}"
                kept = whole_checkpoints(run_dir)
                if run.returncode == 0:
                    assert kept == SAVES, where
                    ignored += is_harmless
                else:
                    assert not is_harmless, where
                    assert kept < SAVES and folder in run.stderr and "errno" in run.stderr, where
                    failed += 1
    assert failed > 25 * len(CALLS) // 10 and ignored > 2 * len(CALLS), (failed, ignored)
    print(f"{failed} failing calls cost the save they were in; {ignored} that can be done without, or again, cost nothing")


main()
