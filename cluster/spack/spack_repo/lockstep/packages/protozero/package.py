from spack.package import *
from spack_repo.builtin.build_systems.cmake import CMakePackage


class Protozero(CMakePackage):
    """Protocol buffers as a few headers; Spack itself has no recipe."""

    license("BSD-2-Clause")
    git = "https://github.com/mapbox/protozero.git"
    version("1.7.1", tag="v1.7.1")

    depends_on("cxx", type="build")

    def cmake_args(self):
        return [self.define("BUILD_TESTING", False)]
