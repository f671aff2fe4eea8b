"""exposure_test.py BIN_DIR: what a job shows of itself on the machine's network, and of the secrets in its user's environment. On one machine nothing
of it listens anywhere but on loopback, save mpirun itself: its port for daemons is open on every interface, one for IPv4 and one for IPv6, whatever
*_if_include says (open-mpi/ompi issue 14441). Secrets are in no command line, no output and no file, in a job that trains, crashes, starts
again, hangs and gives its verdict. A crash leaves no core file."""

import contextlib
import os
import pathlib
import re
import resource
import signal
import socket
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

SECRETS = {name: f"canary-{number}-5dQ7xVw2" for number, name in enumerate(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "LOCKSTEP_PASSWORD", "NCCL_AUTH_COOKIE"))}
FLAGS = ["--steps=100000", "--checkpoint_interval_steps=5", "--eval_interval_steps=0", "--layers=1", "--width=32", "--heads=2", "--sequence_length=32", "--global_batch_size=8",
         "--micro_batch_size=4", "--profile_steps=1:3", "--hang_timeout_s=2"]
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # as /proc/net/tcp and tcp6 write 127.0.0.1 and ::1
LISTEN, UNCONNECTED = "0A", "07"  # the states of TCP and UDP sockets that take from anyone


def read(path):
    """The bytes of a file that may go meanwhile: of a process that ends, of a job that runs."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def sockets_of(processes):
    found = set()
    for process in processes:
        with contextlib.suppress(FileNotFoundError):  # one that was just started for a moment is over
            for number in os.listdir(f"/proc/{process}/fd"):
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    link = os.readlink(f"/proc/{process}/fd/{number}")
                    found |= {link[8:-1]} if link.startswith("socket:[") else set()
    return found


def listening(processes):
    """[protocol, address:port as the kernel writes them] of the sockets of these processes that others may reach."""
    ours, found = sockets_of(processes), []
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in pathlib.Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in ours and words[3] == (LISTEN if protocol.startswith("tcp") else UNCONNECTED):
                found.append((protocol, words[1]))
    return found


def open_to_all(processes):
    return [(protocol, address) for protocol, address in listening(processes) if address.split(":")[0] not in LOOPBACK]


def check_the_check():
    with socket.create_server(("0.0.0.0", 0)):
        seen = open_to_all([os.getpid()])
    assert len(seen) == 1, "a port of this process that is open to all is not seen: this test would prove nothing"


def secrets_in(text):
    return [name for name, value in SECRETS.items() if value.encode() in text]


def check_words(processes):
    for process in processes:
        words = read(pathlib.Path(f"/proc/{process}/cmdline"))
        assert not secrets_in(words), f"{secrets_in(words)} in the command line {words}"


def check_files(folder):
    looked_at = 0
    for path in folder.rglob("*"):
        if path.is_file():
            found = secrets_in(read(path))
            assert not found, f"{found} in {path}"
            looked_at += 1
    return looked_at


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    check_the_check()
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)  # as a user who wants them
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        run_dir, temporary = folder / "run", folder / "tmp"
        temporary.mkdir()
        runs.write_tokens(folder / "train.bin", 20_000)
        command = runs.command(bin_dir, "gpt", 2, run_dir, [f"--train_data={folder / 'train.bin'}", f"--metrics_port={runs.free_port()}", *FLAGS], ["--restarts=2"])
        job = runs.Job(command, TMPDIR=str(temporary), **SECRETS)
        try:
            job.until(lambda: runs.durable_step(run_dir) > 0, "a checkpoint is durable")
            processes = runs.processes_of(run_dir)
            mpiruns = [process for process in processes if read(pathlib.Path(f"/proc/{process}/comm")) == b"mpirun\n"]
            ports, of_mpirun = listening(set(processes) - set(mpiruns)), open_to_all(mpiruns)
            assert ports, "the metrics endpoint listens, and is not seen"
            assert not open_to_all(set(processes) - set(mpiruns)), f"of ours, open to the network: {open_to_all(processes)}"
            assert len(of_mpirun) <= 2, f"of mpirun, open to the network: {of_mpirun}"
            check_words(processes)
            check_files(temporary)
            for rank in runs.processes_of(run_dir, "gpt"):
                limits = read(pathlib.Path(f"/proc/{rank}/limits")).decode()
                assert re.search(r"Max core file size +0 +0 ", limits), f"a crash of rank {rank} would leave its memory in a file:\n{limits}"

            at = time.monotonic()
            os.kill(runs.processes_of(run_dir, "gpt")[0], signal.SIGSEGV)
            again = job.until(lambda: job.when("^lockstep: starting again", at), "it starts again after a crash")
            job.until(lambda: job.step(again), "a step of the second start")
            at = time.monotonic()
            os.kill(runs.processes_of(run_dir, "gpt")[0], signal.SIGSTOP)
            job.until(lambda: job.when("never arrived|stands still", at), "the verdict on a rank that is stopped")
            again = job.until(lambda: job.when("^lockstep: starting again", at), "it starts again after a hang")
            job.until(lambda: job.step(again), "a step of the third start")
            job.process.terminate()
            assert job.wait() == 75, job.said()[-3000:]
        finally:
            job.end()
        assert list(run_dir.glob("hang-*.json")), f"no verdict among {list(run_dir.iterdir())}"
        assert not secrets_in(job.said().encode()), f"{secrets_in(job.said().encode())} in what the job said"
        print(f"{len(ports)} ports of ours, all on loopback; of mpirun {len(of_mpirun)} on every interface; no secret in {check_files(folder)} files and {len(job.lines)} lines", flush=True)


if __name__ == "__main__":
    main()
