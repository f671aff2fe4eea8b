#!/usr/bin/env python3
"""foreign_readers_test.py WRITER VENV_PYTHON: what our code saves, safetensors and torch's own reader load and reshard.

Exit code 77: skipped, because the test environment is not installed.
"""
import os
import subprocess
import sys
import tempfile

writer, venv_python = sys.argv[1:3]
if os.path.abspath(sys.prefix) != os.path.abspath(os.path.join(os.path.dirname(venv_python), "..")):
    if not os.path.exists(venv_python):
        print("SKIPPED: foreign_readers needs the Python test environment; cmake/setup.sh test installs it")
        sys.exit(77)
    os.execv(venv_python, [venv_python, *sys.argv])

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

# The names, shapes and contents of tests/checkpoint/state.cc.
KINDS = [
    ("weights", "embedding.weight", (13, 6), torch.float32),
    ("weights", "head.weight", (5, 7), torch.bfloat16),
    ("weights", "head.bias", (7,), torch.float32),
    ("weights", "cube", (3, 4, 5), torch.float64),
    ("buffers", "norm.num_batches", (), torch.int64),
    ("exp_avg", "embedding.weight", (13, 6), torch.float32),
    ("exp_avg", "head.bias", (7,), torch.float32),
    ("step", "count", (1,), torch.int64),
]
SALT = 1


def expected(section, shape, dtype):
    numel = torch.Size(shape).numel()
    values = torch.arange(numel, dtype=torch.float64) * 3 + SALT * 17 + len(section)
    return values.remainder(251).reshape(shape).to(dtype)


def main():
    wanted = {name if section == "weights" else f"{section}:{name}": expected(section, shape, dtype)
              for section, name, shape, dtype in KINDS}
    with tempfile.TemporaryDirectory() as run:
        subprocess.run([writer, run], check=True)
        checkpoints = os.path.join(run, "checkpoints")
        folders = sorted(os.listdir(checkpoints))
        assert len(folders) == 4, folders
        for folder in folders:
            path = os.path.join(checkpoints, folder)
            state = {key: torch.zeros_like(value) for key, value in wanted.items()}
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(path))
            for key, value in wanted.items():
                assert torch.equal(state[key], value), f"{folder}: torch reads another {key}"
            seen = set()
            for file in os.listdir(path):
                if not file.endswith(".safetensors"):
                    continue
                with safe_open(os.path.join(path, file), "pt") as shard:
                    for key in shard.keys():
                        seen.add(key)
                        if shard.get_tensor(key).shape == wanted[key].shape:
                            assert torch.equal(shard.get_tensor(key), wanted[key]), f"{file}: safetensors, {key}"
            assert seen == set(wanted), f"{folder}: {seen ^ set(wanted)}"
    print("torch.distributed.checkpoint and safetensors read", len(folders), "layouts of", len(wanted), "tensors")


main()
