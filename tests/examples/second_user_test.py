"""second_user_test.py BIN_DIR: what another user of the machine sees of a run while it trains, and of what it leaves: nothing, unless the run
is shared with a group. Tried by a process that has become `nobody`; needs root."""

import contextlib
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

BUILD = str(pathlib.Path(sys.argv[1]).resolve().parent) + "/"  # programs and libraries are no secret
NOBODY, NOGROUP = 65534, 65534
SHARED_GROUP = 54321
FLAGS = ["--steps=100000", "--checkpoint_interval_steps=5", "--eval_interval_steps=0", "--layers=1", "--width=32", "--heads=2", "--sequence_length=32", "--global_batch_size=8",
         "--micro_batch_size=4", "--profile_steps=1:3"]


def as_user(group, groups, work):
    """Runs `work` in a child that is nobody, of these groups, and returns the names it reports."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setresgid(group, group, group)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            os.write(write_end, "\n".join(sorted(work())).encode())
            os._exit(0)
        except BaseException as error:
            os.write(write_end, f"!{error}".encode())
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0, said
    return [name for name in said.split("\n") if name]


def open_to_us(paths, try_folder, flags):
    """Those of the paths that this process can open so, or, of folders, do that with."""
    found = []
    for path in paths:
        try:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                try_folder(path)
            else:
                os.close(os.open(path, flags | os.O_NONBLOCK))
            found.append(str(path))
        except OSError:
            pass
    return found


def plant(folder):
    probe = os.path.join(folder, "planted")
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(probe)


def readable(paths):
    return open_to_us(paths, os.listdir, os.O_RDONLY)


def writable(paths):
    return open_to_us(paths, plant, os.O_WRONLY)


def processes_of(run_dir):
    found = []
    for process in pathlib.Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else [b""]
        except OSError:
            continue
        if f"--run_dir={run_dir}".encode() in words:
            found.append(process)
    return found


def everything_under(folder):
    """What a walk sees; checkpoints come and go meanwhile."""
    return [folder, *sorted(pathlib.Path(top, name) for top, folders, files in os.walk(folder) for name in folders + files)]


def open_to_others(names):
    found = []
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            mode = name.lstat().st_mode
            if mode & 0o077:
                found.append(f"{name} {stat.filemode(mode)}")
    return found


def memory_of(processes):
    """Shared memory and files that the processes hold open or mapped and that have a name outside /usr and /lib, and their /proc entries that show memory."""
    paths = set()
    for process in processes:
        paths.update([process / "mem", process / "environ", process / "maps"])
        try:
            paths.update(process / "fd" / number for number in os.listdir(process / "fd"))
            for line in (process / "maps").read_text().splitlines():
                name = line[73:].strip()
                if name.startswith(("/dev/shm/", "/tmp/")) and not name.startswith(BUILD):
                    paths.add(pathlib.Path(name))
        except OSError:
            pass
    return sorted(paths)


@contextlib.contextmanager
def training(bin_dir, run_dir, flags):
    """A run that has saved and traced, and goes on until the end of the block."""
    job = subprocess.Popen(runs.command(bin_dir, "gpt", 2, run_dir, flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    try:
        while not (list(run_dir.glob("checkpoints/*/MANIFEST")) and list(run_dir.glob("traces/*"))) and job.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint and trace after a minute"
            time.sleep(0.02)
        assert job.poll() is None, job.communicate()[1][-3000:]
        yield job
    finally:
        job.terminate()
        said = job.communicate(timeout=60)[1]
    assert job.returncode == 75, f"exit {job.returncode}:\n{said[-3000:]}"


def check_private(bin_dir, folder, flags):
    run_dir = folder / "private"
    os.umask(0)  # the worst a shell can hand down
    with training(bin_dir, run_dir, flags):
        processes = processes_of(run_dir)
        assert len(processes) >= 3, processes  # lockstep, mpirun and the ranks name it
        names, memory = everything_under(run_dir), memory_of(processes)
        for what in ("logs/lockstep.rank0.", "metrics.jsonl", "ledger.jsonl", "run.json", "events.out", "MANIFEST", ".safetensors", "epoch/1", "traces/"):
            assert any(what in str(name) for name in names), f"{what} is missing: the test would not see it"
        control = [folder / "train.bin"]
        seen = as_user(NOGROUP, [], lambda: readable(control))
        assert seen == [str(control[0])], "nobody cannot even reach the folder: this test would prove nothing"
        seen = as_user(NOGROUP, [], lambda: readable([*names, *memory]))
        assert seen == [], f"nobody reads {seen}"
        assert as_user(NOGROUP, [], lambda: writable(names)) == []
        # Each name by itself too: the modes must not lean on the folder above.
        assert open_to_others(names) == []
    assert open_to_others(everything_under(run_dir)) == []
    print(f"private: {len(names)} names and {len(memory)} of memory, none readable", flush=True)
    return run_dir


def check_shared(bin_dir, folder, flags, run_dir):
    """The same run goes on, shared: what it writes from now on is the group's to read, never to write, and nobody else's."""
    os.umask(0)
    before = set(run_dir.glob("checkpoints/*"))
    with training(bin_dir, run_dir, [*flags, "--share=group"]) as job:
        deadline = time.monotonic() + 60
        while not [path for path in run_dir.glob("checkpoints/*/MANIFEST") if path.parent not in before]:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.02)
    names = everything_under(run_dir)
    for name in names:
        os.chown(name, -1, SHARED_GROUP)
    seen = as_user(NOGROUP, [SHARED_GROUP], lambda: readable(names))
    new = [path for path in run_dir.glob("checkpoints/*/*") if path.parent not in before]
    assert new and set(map(str, new)) <= set(seen), f"the group cannot read {set(map(str, new)) - set(seen)}"
    assert str(run_dir / "run.json") in seen and any("/logs/" in name for name in seen), seen
    assert as_user(NOGROUP, [SHARED_GROUP], lambda: writable(names)) == []
    assert as_user(NOGROUP, [], lambda: readable(names)) == []
    print(f"shared: the group reads {len(seen)} of {len(names)} names, writes none; others none", flush=True)


def main():
    if os.geteuid() != 0:
        print("SKIPPED: second_user: only root can become another user")
        sys.exit(77)
    bin_dir = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        folder.chmod(0o755)
        runs.write_tokens(folder / "train.bin", 20_000)
        (folder / "train.bin").chmod(0o644)
        flags = [f"--train_data={folder / 'train.bin'}", *FLAGS]
        run_dir = check_private(bin_dir, folder, flags)
        check_shared(bin_dir, folder, flags, run_dir)


if __name__ == "__main__":
    main()
