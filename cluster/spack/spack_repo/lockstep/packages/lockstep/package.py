# Spack 1.0: spack repo add cluster/spack/spack_repo/lockstep && spack install lockstep
from pathlib import Path

from spack.package import *
from spack_repo.builtin.build_systems.cmake import CMakePackage


class Lockstep(CMakePackage):
    """Distributed training orchestrator around LibTorch: MPI launcher, bit-exact reductions, durable sharded checkpoints."""

    license("Apache-2.0")
    git = f"file://{Path(__file__).parents[6]}"  # the clone that this recipe lies in
    version("main", branch="main")

    depends_on("cxx", type="build")
    depends_on("cmake@3.25:", type="build")
    depends_on("mpi")
    depends_on("py-torch@2.11.0", type=("build", "link", "run"))  # its LibTorch
    for library in ("gflags", "glog", "gperftools", "isa-l", "libsodium", "nlohmann-json", "pcre2", "protozero", "sentencepiece", "xxhash", "zlib-api"):
        depends_on(library)

    def cmake_args(self):
        torch = join_path(self.spec["py-torch"].prefix, self.spec["python"].package.platlib)
        return [self.define("LOCKSTEP_DEPS_DIR", torch), self.define("LOCKSTEP_BUILD_TESTS", False)]
