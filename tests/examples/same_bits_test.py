"""same_bits_test.py BIN_DIR: the global batch of eight micro-batches gives the same bits on any number of ranks and in buckets of any size.

GPT and ViT, 40 steps; 3 and 5 ranks have uneven shares. Each number of ranks is on MPI for one of the two and on shared memory for the other;
same_bits_local_test.cc says the same of the local back end. Ranks that compute with other instructions are named."""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

STEPS = 40
COMMON = [f"--steps={STEPS}", "--checkpoint_interval_steps=0", "--eval_interval_steps=0", "--learning_rate=2e-3", "--warmup_steps=5", "--log_interval_steps=1000"]
TASKS = {
    "gpt": ["--layers=2", "--width=48", "--heads=3", "--sequence_length=24", "--dropout=0.1", "--global_batch_size=16", "--micro_batch_size=2"],
    "image_classification": ["--model=vit", "--layers=2", "--width=48", "--heads=3", "--patch=7", "--global_batch_size=24", "--micro_batch_size=3"],
}
LAYOUTS = [(ranks, []) for ranks in (1, 2, 3, 4, 5, 8)]
LAYOUTS += [(3, [f"--bucket_bytes={size}", "--backend=mpi"]) for size in (1 << 10, 1 << 20, 1 << 40)]
LAYOUTS += [(1, ["--parallel_micro_batches=1"]), (2, ["--parallel_micro_batches=3"])]


def expect_other_instructions_to_be_named(bin_dir, folder):
    mixed = ["sh", "-c", '[ "$OMPI_COMM_WORLD_RANK" = 0 ] || export ATEN_CPU_CAPABILITY=default; exec "$@"', "sh"]
    flags = [*COMMON, *TASKS["gpt"], "--steps=1", "--warmup_steps=0", f"--train_data={folder / 'gpt.bin'}", f"--run_dir={folder / 'mixed'}"]
    words = [pathlib.Path(runs.__file__).with_name("mpirun.sh"), "3", *mixed, bin_dir / "gpt", *flags]
    said = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr[-4000:]
    for part in ("not all ranks compute alike", "rank 1 (host ", "rank 2 (host ", "ATEN_CPU_CAPABILITY: default against not set", "Mend: "):
        assert part in said.stderr, (part, said.stderr)
    assert "ATEN_CPU_CAPABILITY" in json.loads((folder / "mixed" / "run.json").read_text())["different_arithmetic"]


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "gpt.bin", 20_000)
        runs.write_images(folder / "image_classification.csv", 200)
        for task, flags in TASKS.items():
            backends = itertools.cycle(["mpi", "shm"] if task == "gpt" else ["shm", "mpi"])
            data = next(folder.glob(f"{task}.*"))
            first = None
            for number, (ranks, layout) in enumerate(LAYOUTS):
                if ranks > 1 and "--backend=mpi" not in layout:
                    layout = [*layout, f"--backend={next(backends)}"]
                run_dir = folder / f"{task}-{number}"
                said = runs.run(bin_dir, task, ranks, run_dir, [f"--train_data={data}", *COMMON, *flags, *layout])
                assert "compute alike" not in said, said
                result = (runs.losses(run_dir), runs.digests(bin_dir, run_dir))
                first = first or result
                where = f"{task} on {ranks} ranks {' '.join(layout)}"
                assert ranks == 1 or f"--backend={json.loads((run_dir / 'run.json').read_text())['backend']}" in layout, where
                assert len(result[0]) == STEPS, where
                different = [step for (step, a), (_, b) in zip(first[0], result[0]) if a != b]
                assert not different, f"{where}: loss differs from 1 rank's, first at step {different[0]}"
                assert result[1] == first[1], f"{where}: digests differ: {result[1]} and {first[1]}"
                print(f"{where}: same bits, weights {result[1][1]}", flush=True)
            assert first[0][-1][1] < 0.9 * first[0][0][1], f"{task} learnt nothing, so nothing was tested: {first[0][0]} -> {first[0][-1]}"
        expect_other_instructions_to_be_named(bin_dir, folder)


if __name__ == "__main__":
    main()
