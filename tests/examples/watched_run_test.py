"""watched_run_test.py BIN_DIR: a run of two ranks is watched while it trains, over its port and through its text file, read by Prometheus' own parser;
nothing of it listens anywhere but on loopback; a port that is taken costs a second run a warning and nothing else. With LOCKSTEP_DEEP=1 also what
64 idle clients cost a step."""

import contextlib
import math
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

FLAGS = ["--layers=1", "--width=32", "--heads=2", "--sequence_length=32", "--global_batch_size=8", "--micro_batch_size=4"]
PHASES, PHASE_S = 24, 2
LISTENING = "0A"  # the kernel's TCP_LISTEN
LOOPBACK = ("0100007F", "00000000000000000000000001000000")  # 127.0.0.1 and ::1, as the kernel prints them


def get(port, path):
    """(status, headers, body)"""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def samples_of(text):
    """By name, labels in it: as the page has them. Who reads them for real is asked in check_page()."""
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#")}


def check_page(text):
    """By promtool where it is, and by Prometheus' Python reader."""
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        print("SKIPPED: watched_run: prometheus_client is not there to read the page. Mend: cmake/setup.sh test")
        return
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("lockstep_") and family.documentation and family.samples for name, family in families.items()), families
    assert families["lockstep_step_seconds"].type == "histogram" and families["lockstep_steps"].type == "counter"
    read = {(sample.name, tuple(sample.labels.items())): sample.value for family in families.values() for sample in family.samples}
    assert len(read) == len(samples_of(text)), "two names that are one to it, or samples lost on the way"
    assert read["lockstep_world_size", ()] == 2 and read["lockstep_build_info", (("version", "0.1.0"), ("libtorch", "2.11.0"))] == 1


def listening(processes):
    """{(address, port)} that these processes accept TCP connections at, as hexadecimal text and a number."""
    inodes = set()
    for process in processes:
        for fd in pathlib.Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(fd))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in pathlib.Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and f"socket:[{fields[9]}]" in inodes:
                    address, port = fields[1].split(":")
                    found.add((address, int(port, 16)))
    return found


def wait_for(condition, job):
    deadline = time.monotonic() + 90
    while not (value := condition()):
        assert job.poll() is None and time.monotonic() < deadline, "the run ended, or said nothing for 90 s"
        time.sleep(0.02)
    return value


def page_with(port, *names):
    """The page, once all these have a value."""
    with contextlib.suppress(OSError):
        status, headers, text = get(port, "/metrics")
        assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8", (status, headers)
        if all(name in samples_of(text) for name in names):
            return text
    return None


def check_figures(text):
    figures = samples_of(text)
    assert figures["lockstep_incarnation"] == 1 and figures["lockstep_planned_steps"] == 1_000_000
    assert 0 < figures["lockstep_loss"] < 10 and 0 < figures["lockstep_validation_loss"] < 10
    assert figures["lockstep_step"] == figures["lockstep_steps_total"] == figures["lockstep_step_seconds_count"] >= 40
    assert figures["lockstep_trained_samples_total"] == 8 * figures["lockstep_step"]
    assert figures["lockstep_trained_tokens_total"] == 8 * 32 * figures["lockstep_step"]
    assert math.isclose(figures["lockstep_trained_tokens_per_second"], 32 * figures["lockstep_trained_samples_per_second"])
    assert figures["lockstep_checkpoint_durable_step"] % 40 == 0 and figures["lockstep_checkpoint_failed_saves_total"] == 0
    assert 2**24 < figures["lockstep_memory_bytes"] < 2**32
    assert abs(time.time() - figures["lockstep_last_step_timestamp_seconds"]) < 60


def check_listeners(run_dir, port):
    ranks = runs.processes_of(run_dir, "gpt")
    assert len(ranks) == 2, ranks
    found = listening(ranks)
    assert ("0100007F", port) in found and all(address in LOOPBACK for address, _ in found), found
    starters = [process for process in runs.processes_of(run_dir) if process not in ranks]
    print(f"the ranks listen at {len(found)} port of loopback; the launcher and mpirun: {sorted(listening(starters))}", flush=True)


def check_other_pages(port):
    status, _, text = get(port, "/healthz")
    assert status == 200 and text.startswith("ok: step "), text
    for path in ("/", "/metrics/../healthz", "/debug/pprof", "/-/quit"):
        assert get(port, path)[0] == 404, path


@contextlib.contextmanager
def idle_clients(port, count):
    """Clients that never ask, and come back when they are sent away. Of lowest priority: what they cost themselves is not the question."""
    clients, is_over = [], threading.Event()

    def keep_up():
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while not is_over.wait(0.5):
            for i, client in enumerate(clients):
                with contextlib.suppress(BlockingIOError):
                    client.recv(1000)
                    clients[i] = connect()

    def connect():
        client = socket.create_connection(("127.0.0.1", port))
        client.setblocking(False)
        return client

    try:
        clients.extend(connect() for _ in range(count))
        keeper = threading.Thread(target=keep_up)
        keeper.start()
        yield
    finally:
        is_over.set()
        keeper.join()
        for client in clients:
            client.close()


def step_now(port):
    return int(samples_of(get(port, "/metrics")[2])["lockstep_step"])


def endpoint_cpu_s(run_dir):
    """Processor time of the one thread of lowest priority that the ranks have."""
    tasks = [task for rank in runs.processes_of(run_dir, "gpt") for task in pathlib.Path(f"/proc/{rank}/task").iterdir()]
    found = [task for task in tasks if (task / "stat").read_text().rpartition(")")[2].split()[16] == "19"]
    assert len(found) == 1, found
    return int((found[0] / "schedstat").read_text().split()[0]) * 1e-9


def check_step_time(bin_dir, folder, data):
    """Seconds with and without the clients take turns in one run, so that whatever else the machine does meets both alike."""
    port, run_dir, phases, cpu_s = runs.free_port(), folder / "timed", [], [0, 0]
    flags = ["--model=gpt2", "--layers=2", "--width=64", "--heads=4", "--sequence_length=64", "--global_batch_size=16", "--micro_batch_size=8", *data,
             "--steps=1000000", "--checkpoint_interval_steps=0", "--eval_interval_steps=0", f"--metrics_port={port}"]
    job = subprocess.Popen(runs.command(bin_dir, "gpt", 2, run_dir, flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: page_with(port, "lockstep_loss"), job)
        for phase in range(2 * PHASES):
            before = endpoint_cpu_s(run_dir)
            with idle_clients(port, 64) if phase % 2 else contextlib.nullcontext():
                first = step_now(port)
                time.sleep(PHASE_S)
                phases.append(range(first + 3, step_now(port) - 1))
            cpu_s[phase % 2] += endpoint_cpu_s(run_dir) - before
    finally:
        job.terminate()
        job.wait(timeout=90)
    seconds = {line["step"]: line["step_s"] for line in runs.metrics(run_dir)}
    def median(some):
        return statistics.median(seconds[step] for phase in some for step in phase)
    without, during, noise = median(phases[::2]), median(phases[1::2]), median(phases[2::4]) / median(phases[::4])
    print(f"step {1e3 * without:.2f} ms, with 64 idle clients {1e3 * during:.2f} ms: {100 * (during / without - 1):+.1f} % (of seconds without them, every other "
          f"against the rest {100 * (noise - 1):+.1f} %). The endpoint's thread takes {100 * cpu_s[1] / PHASES / PHASE_S:.2f} % of a core, "
          f"{100 * cpu_s[0] / PHASES / PHASE_S:.2f} % without them", flush=True)
    assert cpu_s[1] <= 0.02 * PHASES * PHASE_S
    assert during / without <= 1.02 + abs(noise - 1), "on a machine with nothing else to do?"


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 20_000)
        runs.write_tokens(folder / "validation.bin", 2_000, seed=8)
        data = [f"--train_data={folder / 'train.bin'}", f"--validation_data={folder / 'validation.bin'}"]
        port, run_dir, text_file = runs.free_port(), folder / "run", folder / "lockstep.prom"
        watched = [*FLAGS, *data, "--steps=1000000", "--checkpoint_interval_steps=40", "--eval_interval_steps=20", f"--metrics_port={port}", f"--metrics_textfile={text_file}"]
        job = subprocess.Popen(runs.command(bin_dir, "gpt", 2, run_dir, watched), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            text = wait_for(lambda: page_with(port, "lockstep_validation_loss", "lockstep_checkpoint_durable_step"), job)
            check_page(text)
            check_figures(text)
            check_other_pages(port)
            check_listeners(run_dir, port)
            said = runs.run(bin_dir, "gpt", 1, folder / "second", [*FLAGS, *data, "--steps=3", f"--metrics_port={port}"])
            assert f"no metrics at 127.0.0.1 port {port}" in said and "training goes on" in said, said
            assert samples_of(wait_for(lambda: page_with(port), job))["lockstep_step"] > samples_of(text)["lockstep_step"]
        finally:
            job.terminate()
            said = job.communicate(timeout=90)[1]
        assert job.returncode == 75, f"exit {job.returncode}:\n{said[-3000:]}"
        last = samples_of(text_file.read_text())
        check_page(text_file.read_text())
        assert last["lockstep_step"] == last["lockstep_checkpoint_durable_step"] == runs.metrics(run_dir)[-1]["step"], last
        assert sorted(name.name for name in folder.glob("lockstep.prom*")) == ["lockstep.prom"]
        if os.environ.get("LOCKSTEP_DEEP") == "1":
            check_step_time(bin_dir, folder, data)
        print(f"watched to step {int(last['lockstep_step'])}: {len(samples_of(text))} samples, {len(text)} bytes", flush=True)


if __name__ == "__main__":
    main()
