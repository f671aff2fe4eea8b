"""hang_test.py PROGRAM MPIRUN AGENT [CASES]: hangs of every kind on real ranks (RELIABILITY T7). Each must be found within the timeout and a second,
with the rank, group, call and operation that are at fault, and the job must end. A run of random delays below the timeout goes on beside them.
LOCKSTEP_DEEP=1: 500 cases and 10 minutes of delays."""

import concurrent.futures
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

PROGRAM, MPIRUN, AGENT = sys.argv[1:4]
IS_DEEP = os.environ.get("LOCKSTEP_DEEP") == "1"
CASES = int(sys.argv[4]) if len(sys.argv) > 4 else 500 if IS_DEEP else 40
T = 3.0
AT_ONCE = 8
CAUSE = {"stop": "never_arrived", "sleep": "never_arrived", "spin": "never_arrived", "hold": "never_arrived", "die": "gone", "crash": "gone", "leave": "gone",
         "missing": "mismatch", "swapped": "mismatch", "circle": "mismatch", "count": "mismatch", "dtype": "mismatch", "root": "mismatch"}
# What a job ends with: a death is mpirun's to tell, and ranks that got other bytes than they asked for may find that out themselves.
FREE_END = {"die", "crash", "leave", "count", "dtype", "root", "swapped", "missing"}


def is_running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def rings():
    """Of the ranks that were started here: a ring has its rank's pid at byte 16."""
    found = []
    for path in pathlib.Path("/dev/shm").glob("lockstep-*"):
        try:
            with open(path, "rb") as file:
                found += [path.name] if int.from_bytes(file.read(20)[16:], "little") in PIDS else []
        except OSError:  # it went meanwhile
            pass
    return found


def environment(**more):
    return {**os.environ, "LOCKSTEP_AGENT": AGENT, "T": str(T), **more}


def end(process, folder):
    for path in folder.glob("pid.*"):
        if text := path.read_text().strip():
            PIDS.add(int(text))
            if is_running(int(text)):
                os.kill(int(text), signal.SIGKILL)
    if process.poll() is None:
        process.kill()
    process.wait()


def run_case(number):
    """Returns nothing, or what is wrong."""
    generator = random.Random(number)
    fault = list(CAUSE)[number % len(CAUSE)]
    ranks = 5 if fault == "circle" else generator.choice([3, 4])
    # In a circle of two groups, the one that differs is known where two others of both agree.
    culprit, step = generator.choice([0, 2, 4]) if fault == "circle" else generator.randrange(ranks), generator.randrange(1, 6)
    backend = generator.choice(["shm", "mpi"])
    name = f"case {number}: {fault} of rank {culprit} of {ranks} in step {step} on {backend}"
    with tempfile.TemporaryDirectory(prefix="lockstep_hang_") as path:
        folder = pathlib.Path(path)
        process = subprocess.Popen([MPIRUN, str(ranks), PROGRAM, fault, str(culprit), str(step), path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=environment(BACKEND=backend))
        try:
            return check(process, folder, name, fault, culprit)
        finally:
            end(process, folder)


def check(process, folder, name, fault, culprit):
    deadline = time.monotonic() + 120
    while not (folder / "expect").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            return f"{name}: ended before its fault: {process.communicate()[0]}"
        time.sleep(0.01)
    try:
        said = process.communicate(timeout=T + 60)[0]
    except subprocess.TimeoutExpired:
        return f"{name}: does not end"
    # Ranks whose calls differ may find it themselves and be gone; their agent says so once it has seen that.
    records, deadline = [], time.monotonic() + 10
    while not records and time.monotonic() < deadline:
        records = list(folder.glob("hang-*.json"))
        time.sleep(0.01)
    if len(records) != 1:
        return f"{name}: {len(records)} verdicts; it ended with {process.returncode}: {said}"
    record = json.loads(records[0].read_text())
    group, sequence, op = (folder / "expect").read_text().split()
    found = (record["cause"], record["culprits"], record["group"], record["sequence"], record["op"])
    if found != (CAUSE[fault], [culprit], group, int(sequence), op):
        return f"{name}: found {found}, not {(CAUSE[fault], [culprit], group, int(sequence), op)}: {record['message']}\n{said}"
    if fault not in FREE_END and process.returncode != 76:
        return f"{name}: ended with {process.returncode}: {said}"
    if fault not in FREE_END and record["message"].split(":")[0] not in said:
        return f"{name}: the verdict is not in the log: {said}"
    if fault in ("sleep", "spin", "hold") and "Stack of rank" not in record["message"]:
        return f"{name}: no stack: {record['message']}"
    # From the hang to the verdict by the times of the files that tell of them, and by what the verdict itself says: however busy this machine is with
    # starting and ending processes.
    took = records[0].stat().st_mtime - (folder / "expect").stat().st_mtime
    LATE.append((took - (T if CAUSE[fault] == "never_arrived" or fault in ("circle", "missing") else 0), name))
    WAITED.append((record["waited_s"] - T, name))
    return None


def run_delays(seconds):
    with tempfile.TemporaryDirectory(prefix="lockstep_delays_") as path:
        process = subprocess.Popen([MPIRUN, "4", PROGRAM, "delays", "0", str(seconds), path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=environment())
        try:
            said = process.communicate(timeout=seconds + 120)[0]
        finally:
            end(process, pathlib.Path(path))
        verdicts = list(pathlib.Path(path).glob("hang-*"))
        return f"false alarm: {process.returncode} {said}" if process.returncode != 0 or verdicts else None


LATE, WAITED, PIDS = [], [], set()
start = time.monotonic()
with concurrent.futures.ThreadPoolExecutor(AT_ONCE + 1) as pool:
    delays = pool.submit(run_delays, 600 if IS_DEEP else 60)
    faults = [fault for fault in pool.map(run_case, range(CASES)) if fault]
    if fault := delays.result():
        faults.append(fault)
deadline = time.monotonic() + 5
while rings() and time.monotonic() < deadline:
    time.sleep(0.1)
if left := rings():
    faults.append(f"left in /dev/shm: {left}")
LATE.sort()
print(f"{CASES - len(faults)} of {CASES} hangs found, after timeouts that are waited for: median {LATE[len(LATE) // 2][0]:.2f} s, last {LATE[-1]}, "
      f"{time.monotonic() - start:.0f} s in all")
faults += [f"late by {late:.2f} s: {name}" for late, name in LATE + WAITED if late > 1.0]
sys.exit("\n".join(faults) or 0)
