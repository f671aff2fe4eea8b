"""Arrows between layers point down, what must know no torch knows none, and a configure step refuses the rest.

Usage: link_graph_test.py GRAPH BUILD_DIR
GRAPH: one line a target, "name: link;link;...", as CMake knows it (tests/build/CMakeLists.txt writes it).
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# The architecture, said a second time on purpose: cmake/Layers.cmake must not be changed alone.
LAYERS = [{"base"}, {"flight", "format", "metrics"}, {"collectives", "nn"}, {"sharding", "data", "optim"}, {"checkpoint"}, {"train"}]
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}
TORCH_FREE = LAYERS[0] | LAYERS[1]
PROGRAMS = {"lockstep": TORCH_FREE, "tokenize": TORCH_FREE}  # what they may link of ours; other programs: anything
HEAVY = re.compile(r"torch|\b(lib)?(c10|mpi|nccl|cuda|cupti)", re.IGNORECASE)

graph, build = Path(sys.argv[1]), Path(sys.argv[2])
faults, arrows = [], 0


def ours(link):
    found = re.search(r"lockstep(?:::|_)(\w+)", link)
    return found.group(1) if found and found.group(1) in LAYER else None


for line in graph.read_text().splitlines():
    target, _, links = line.partition(": ")
    name = ours(target)
    for link in filter(None, links.split(";")):
        below = ours(link)
        arrows += below is not None
        if name and below and LAYER[below] >= LAYER[name]:
            faults.append(f"{name} links {below}, which is not below it")
        if (name in TORCH_FREE or target in PROGRAMS) and HEAVY.search(link):
            faults.append(f"{target} links {link}")
        if target in PROGRAMS and below and below not in PROGRAMS[target]:
            faults.append(f"{target} links {below}")
    if target.startswith("lockstep_") and not name:
        faults.append(f"{target} is in no layer")
assert arrows > 15, f"{graph} has only {arrows} arrows: is it whole?"

# What the dynamic linker would load, in the end. Ranks may die of their libraries; what starts and watches them may not.
for path in [build / "bin/lockstep", build / "bin/tokenize", *(build / f"lib/liblockstep_{name}.so" for name in TORCH_FREE)]:
    needed = subprocess.run(["ldd", path], check=True, text=True, capture_output=True).stdout
    faults += [f"{path.name} loads {line.split()[0]}" for line in needed.splitlines() if HEAVY.search(line.split()[0])]
# The core runs where there is no GPU and no driver: nothing of ours but the plug-in asks for a CUDA library itself.
for path in set((build / "lib").glob("liblockstep_*.so")) - {build / "lib/liblockstep_cuda.so"}:
    needed = subprocess.run(["readelf", "-d", path], check=True, text=True, capture_output=True).stdout
    faults += [f"{path.name} needs {name}" for name in re.findall(r"NEEDED.*\[(.*)\]", needed) if re.search("cuda|nccl", name)]
# A training program takes small blocks from tcmalloc, which it must name itself: behind libc it would not be asked.
for path in filter(Path.exists, (build / f"bin/{name}" for name in ("gpt", "image_classification"))):
    found = subprocess.run([path, "--help"], env={"LD_DEBUG": "bindings"}, text=True, capture_output=True).stderr
    owner = re.findall(r"binding file \S*libtorch_cpu\S* \[0\] to (\S+) \[0\]: normal symbol `malloc'", found)
    if not owner or "tcmalloc" not in owner[0]:
        faults.append(f"{path.name} takes malloc from {owner or 'nowhere'}")

# Negative controls: does the configure step refuse?
REFUSALS = {
    "down": None,
    "up": "base (layer 0) may not link collectives (layer 2)",
    "sideways": "collectives (layer 2) may not link nn (layer 2)",
    "torch": "metrics may not link lockstep::torch_cpu",
    "unknown": "does not know the library 'attic'",
}
for arrow, refusal in REFUSALS.items():
    with tempfile.TemporaryDirectory(prefix="lockstep_layers_") as folder:
        done = subprocess.run(["cmake", "-S", Path(__file__).parent / "layers", "-B", folder, f"-DARROW={arrow}"],
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = " ".join(done.stdout.split())
        if (done.returncode == 0) != (refusal is None) or (refusal or "") not in said:
            faults.append(f"an arrow that points {arrow} ends with {done.returncode}: {said[-500:]}")

print(f"{arrows} arrows between layers")
sys.exit("\n".join(faults) or 0)
