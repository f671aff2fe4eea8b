"""The installed package is enough: README's own program, outside the tree, finds it, builds on it, and trains, alone and on two ranks.

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
    source = folder + "/source"
    os.mkdir(source)
    readme = open(here + "/../../README.md").read()
    for language, name in (("cpp", "sine.cc"), ("cmake", "CMakeLists.txt")):
        with open(f"{source}/{name}", "w") as file:
            file.write(re.search(f"^```{language}\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE).group(1))
    run("cmake", "-S", source, "-B", outside, "-DCMAKE_PREFIX_PATH=" + prefix, "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", outside)
    libraries = run("ldd", outside + "/sine")
    assert prefix in libraries and os.path.realpath(build) not in libraries, libraries
    losses = []
    for ranks, command in ((1, [outside + "/sine"]), (2, [mpirun, "2", outside + "/sine"])):
        output = run(*command, f"--run_dir={folder}/run{ranks}", "--steps=400", "--learning_rate=0.01")
        losses.append(re.search(r"done: 400 steps in .*, loss (\S+)", output).group(1))
        print(f"{ranks} ranks, loss {losses[-1]}")
    assert float(losses[0]) < 0.01 and losses[0] == losses[1], losses
    assert run(prefix + "/bin/lockstep", "--help")
