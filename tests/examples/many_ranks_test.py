"""many_ranks_test.py BIN_DIR: 64 ranks on this machine complete steps of a tiny GPT with real collectives, and with one rank's bits."""

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

RANKS = 64
FLAGS = ["--steps=2", "--layers=1", "--width=32", "--heads=2", "--sequence_length=16", f"--global_batch_size={RANKS}", "--micro_batch_size=1", "--eval_interval_steps=0"]


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    available = next(int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable")) / 2**20
    if available < 9:
        print(f"SKIPPED: 64 ranks: {available:.1f} GiB of memory are free, 9 are needed")
        sys.exit(77)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        runs.write_tokens(folder / "train.bin", 10_000)
        results = []
        for ranks in (1, RANKS):
            runs.run(bin_dir, "gpt", ranks, folder / str(ranks), [f"--train_data={folder / 'train.bin'}", *FLAGS])
            results.append((runs.losses(folder / str(ranks)), runs.digests(bin_dir, folder / str(ranks))))
        assert results[0] == results[1], results
        print(f"{RANKS} ranks: same bits as one, weights {results[0][1][1]}")


if __name__ == "__main__":
    main()
