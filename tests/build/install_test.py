"""The installed package is enough: a program outside the tree finds it, builds on it, and trains, alone and on two ranks.

Usage: install_test.py BUILD_DIR MPIRUN_SCRIPT
"""
import os
import re
import subprocess
import sys
import tempfile

build, mpirun = sys.argv[1:3]
here = os.path.dirname(os.path.abspath(__file__))
# The package must stand without the tree's help.
environment = {name: value for name, value in os.environ.items() if not name.startswith(("CMAKE_", "lockstep_", "LD_LIBRARY"))}


def run(*command):
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\nexit code {done.returncode}")
    return done.stdout


with tempfile.TemporaryDirectory(prefix="lockstep_install_") as folder:
    prefix, outside = folder + "/prefix", folder + "/build"
    run("cmake", "--install", build, "--prefix", prefix)
    for path, _, names in os.walk(prefix + "/lib/cmake"):
        for name in names:
            text = open(os.path.join(path, name)).read()
            tree = [line for line in text.splitlines() if os.path.realpath(here + "/../..") in line and "LOCKSTEP_TORCH_DIR" not in line]
            assert not tree, f"{name} points into the source tree: {tree}"
    run("cmake", "-S", here + "/outside", "-B", outside, "-DCMAKE_PREFIX_PATH=" + prefix, "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", outside)
    libraries = run("ldd", outside + "/line")
    assert prefix in libraries and os.path.realpath(build) not in libraries, libraries
    for command in ([outside + "/line"], [mpirun, "2", outside + "/line"]):
        output = run(*command, f"{folder}/run{len(command)}")
        assert re.search(r"ranks, loss \S+ after 200 steps", output), output
        print(re.search(r".*ranks, loss.*", output).group())
    assert run(prefix + "/bin/lockstep", "--help")
