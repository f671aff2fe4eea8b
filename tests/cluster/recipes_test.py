"""recipes_test.py: what cluster/ gives to other programs is what they take: shell, Kubernetes, container and Spack files."""

import ast
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"

# The fields that we rely on and their types; a list holds the type of its elements, anything else in these objects is an error. (Both files were
# checked once, whole and strictly, against the operators' own definitions, which have 1.8 MB.)
POD = {"spec": {"terminationGracePeriodSeconds": int, "volumes": list, "containers": [{"name": str, "image": str, "command": [str], "volumeMounts": list, "resources": dict,
                                                                                     "readinessProbe": dict}]}}
MPI_REPLICA = {"replicas": int, "restartPolicy": str, "template": POD}
JOB = {"metadata": dict, "spec": {"backoffLimit": int, "template": POD}}
FIELDS = {
    "MPIJob": {"slotsPerWorker": int, "sshAuthMountPath": str, "launcherCreationPolicy": str, "runPolicy": {"backoffLimit": int, "cleanPodPolicy": str},
               "mpiReplicaSpecs": {"Launcher": MPI_REPLICA, "Worker": MPI_REPLICA}},
    "TrainingRuntime": {"mlPolicy": {"numNodes": int, "mpi": {"mpiImplementation": str, "numProcPerNode": int, "sshAuthMountPath": str, "runLauncherAsNode": bool}},
                        "template": {"spec": {"network": {"publishNotReadyAddresses": bool}, "successPolicy": {"operator": str, "targetReplicatedJobs": [str]},
                                              "replicatedJobs": [{"name": str, "dependsOn": list, "template": JOB}]}}},
    "TrainJob": {"runtimeRef": {"apiGroup": str, "kind": str, "name": str}, "trainer": {"numNodes": int, "command": [str], "resourcesPerNode": dict}},
}
VERSIONS = {"MPIJob": "kubeflow.org/v2beta1", "TrainingRuntime": "trainer.kubeflow.org/v1alpha1", "TrainJob": "trainer.kubeflow.org/v1alpha1"}


def check(value, wanted, where):
    if isinstance(wanted, dict):
        assert isinstance(value, dict), f"{where} is no object"
        for key, inner in value.items():
            assert key in wanted, f"{where}.{key} is not known"
            check(inner, wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(value, list), f"{where} is no list"
        for number, inner in enumerate(value):
            check(inner, wanted[0], f"{where}[{number}]")
    else:
        assert type(value) is wanted, f"{where} is {value!r}, not a {wanted.__name__}"


def check_kubernetes():
    try:
        import yaml
    except ImportError:
        return print("SKIPPED: cluster_recipes, Kubernetes: no python3-yaml")
    for path in sorted((CLUSTER / "kubernetes").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            kind = document["kind"]
            assert document["apiVersion"] == VERSIONS[kind] and document["metadata"]["name"], path
            check(document["spec"], FIELDS[kind], f"{path.name} {kind}")
            print(f"ok: {path.name}, {kind}")


def check_shell():
    scripts = [*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch"), *(ROOT / "tests/cluster").glob("*.sh")]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        return print("SKIPPED: cluster_recipes, shell: no shellcheck")
    subprocess.run(["shellcheck", *scripts], check=True)
    print(f"ok: {len(scripts)} scripts")


def packages():
    return {line.split("#")[0].strip() for line in (ROOT / "cmake/packages-runtime.txt").read_text().splitlines()} - {""}


def check_spack():
    """Each library that we build with has its counterpart."""
    recipe = CLUSTER / "spack/spack_repo/lockstep/packages/lockstep/package.py"
    for path in recipe.parents[1].rglob("*.py"):
        ast.parse(path.read_text(), str(path))
    libraries = {re.sub(r"^lib(google-)?|3?-dev$|2?-dev$", "", package) for package in packages() if package.endswith("-dev")}
    renamed = {"perftools": "gperftools", "isal": "isa-l", "openmpi": "mpi", "zlib1g": "zlib-api", "nlohmann-json": "nlohmann-json", "pcre": "pcre2", "sodium": "libsodium"}
    missing = {renamed.get(library, library) for library in libraries} - set(re.findall(r'"([a-z0-9-]+)"', recipe.read_text()))
    assert not missing, f"{recipe} does without {sorted(missing)} of cmake/packages-runtime.txt"
    print(f"ok: Spack, {len(libraries)} libraries")


def check_containers():
    """What they run is there, and both build alike."""
    steps = ["cmake/setup.sh runtime", "cmake --preset release -DLOCKSTEP_BUILD_TESTS=OFF", "cmake --install build/release --prefix /usr/local"]
    for name in "Dockerfile", "apptainer.def":
        text = (CLUSTER / name).read_text()
        assert all(step in text for step in steps), f"{name} lacks one of {steps}"
    known = r"(#.*|FROM \S+|COPY \S+ \S+|WORKDIR \S+|USER \S+|RUN .+|CMD \[.+\]| && .+|)"
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        assert re.fullmatch(known, line), f"Dockerfile: {line}"
    assert (ROOT / "cmake/setup.sh").exists()
    sections = re.findall(r"^%(\w+)$", (CLUSTER / "apptainer.def").read_text(), re.MULTILINE)
    assert sections == ["files", "post", "runscript"], sections
    print("ok: Dockerfile, apptainer.def")


def check_hostfile():
    for line in (CLUSTER / "hostfile.example").read_text().splitlines():
        assert re.fullmatch(r"#.*|[\w.-]+ slots=\d+", line), line
    print("ok: hostfile.example")


if __name__ == "__main__":
    check_kubernetes()
    check_shell()
    check_spack()
    check_containers()
    check_hostfile()
    sys.exit(0)
