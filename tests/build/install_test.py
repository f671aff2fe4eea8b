"""The installed package is enough: README's own programs, outside the tree, find it, build on it, and train, alone and on two ranks.
The second one's blocks are units: with ZeRO-3 and recomputation on two ranks it computes the bits of one plain rank.

Usage: install_test.py BUILD_DIR MPIRUN_SCRIPT
"""
import json
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


def snippets(language, text):
    return re.findall(f"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def train(program, ranks, *flags):
    """Losses of all steps, and the digests of what the run leaves."""
    run_dir = f"{folder}/{program}{ranks}"
    run(*([mpirun, str(ranks)] if ranks > 1 else []), f"{outside}/{program}", f"--run_dir={run_dir}", "--steps=400", "--learning_rate=0.01", *flags)
    losses = [json.loads(line)["loss"] for line in open(run_dir + "/metrics.jsonl")]
    print(f"{program}, {ranks} ranks {' '.join(flags)}: loss {losses[0]} to {losses[-1]}")
    tensors = json.loads(run(prefix + "/bin/lockstep", "inspect", "--json", run_dir))["tensors"]
    return losses, {name: tensor["digest"] for name, tensor in tensors.items()}


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
    sine, blocks, *_ = snippets("cpp", readme)
    start, main = sine.split("int main")
    lists = snippets("cmake", readme)[0]
    files = {"sine.cc": sine, "blocks.cc": start + blocks + "\nint main" + main.replace("<FitSine>", "<FitSineWithBlocks>"),
             "CMakeLists.txt": lists + "add_executable(blocks blocks.cc)\ntarget_link_libraries(blocks PRIVATE lockstep::train)\n"}
    for name, text in files.items():
        with open(f"{source}/{name}", "w") as file:
            file.write(text)
    run("cmake", "-S", source, "-B", outside, "-DCMAKE_PREFIX_PATH=" + prefix, "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", outside, "--parallel", "2")
    libraries = run("ldd", outside + "/sine")
    assert prefix in libraries and os.path.realpath(build) not in libraries, libraries
    alone, (losses, digests) = train("sine", 1), train("sine", 2)
    assert losses[-1] < 0.01 and alone == (losses, digests), (alone[0][-1], losses[-1])
    alone, (losses, digests) = train("blocks", 1), train("blocks", 2, "--zero_stage=3", "--recompute=full")
    assert alone[0] == losses, f"losses part at step {next(i for i, pair in enumerate(zip(alone[0], losses)) if pair[0] != pair[1])}"
    assert alone[1] == digests and "a.up.weight" in digests, (alone[1], digests)
    assert losses[-1] < 0.01 * losses[0], losses
