"""bad_input_test.py BIN_DIR: what a person can get wrong, on one rank and on two: the documented exit code, a message that names the mend, and
nothing half-written: no checkpoint, no metrics."""

import os
import pathlib
import stat
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

CONFIG, DATA = 78, 65
GOOD = ["--steps=2", "--layers=1", "--width=32", "--heads=2", "--sequence_length=16", "--global_batch_size=8", "--micro_batch_size=2", "--eval_interval_steps=0"]


def cases(folder):
    """(name, flags after the good ones, exit code, words the message must hold)"""
    def data(name):
        return f"--train_data={folder / name}"

    runs.write_tokens(folder / "good.bin", 5000)
    runs.write_tokens(folder / "few.bin", 40)
    runs.write_tokens(folder / "large_id.bin", 5000, largest=300)
    (folder / "empty.bin").write_bytes(b"")
    (folder / "truncated.bin").write_bytes((folder / "good.bin").read_bytes()[:-101])
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "folder.bin").mkdir()
    (folder / "file").write_text("in the way")
    good = data("good.bin")
    return [
        ("unknown flag", [good, "--learning_rat=1"], CONFIG, ["learning_rate"]),
        ("no number", [good, "--steps=many"], CONFIG, ["steps", "many"]),
        ("leftover word", [good, "steps=3"], CONFIG, ["steps=3", "Mend"]),
        ("unknown precision", [good, "--precision=fp8"], CONFIG, ["fp8", "bf16"]),
        ("unknown schedule", [good, "--learning_rate_schedule=step"], CONFIG, ["step", "cosine"]),
        ("unknown model", [good, "--model=rnn"], CONFIG, ["rnn", "gpt2"]),
        ("no steps", [good, "--steps=0"], CONFIG, ["steps", "positive"]),
        ("heads that do not divide", [good, "--heads=3"], CONFIG, ["32", "3"]),
        ("experts in the other family", [good, "--experts=4"], CONFIG, ["--experts=4", "llama"]),
        ("more choices than experts", [good, "--model=llama", "--experts=2", "--experts_per_token=3"], CONFIG, ["3", "--experts=2"]),
        ("sharing experts that are not there", [good, "--expert_parallel_size=2"], CONFIG, ["--expert_parallel_size=1"]),
        ("prompt out of vocabulary", [good, "--vocab_size=65", "--generate_tokens=2", "--prompt=HAMLET"], CONFIG, ["72", "65", "Mend"]),
        ("choice among none", [good, "--generate_tokens=2", "--top_k=0"], CONFIG, ["--top_k=0"]),
        ("negative share of ranks", [good, "--zero_stage=1", "--zero_shard_size=-1"], CONFIG, ["--zero_shard_size=-1"]),
        ("rate that is no number", [good, "--learning_rate=nan"], CONFIG, ["--learning_rate=nan"]),
        ("no rotary base", [good, "--model=llama", "--rope_theta=0"], CONFIG, ["--rope_theta"]),
        ("micro-batch that does not divide", [good, "--micro_batch_size=3"], CONFIG, ["8", "3", "Mend", "--global_batch_size=9"]),
        ("fewer micro-batches than ranks", [good, "--micro_batch_size=8", "--data_parallel_size=2"], CONFIG, ["2"]),
        ("sizes that are not the world", [good, "--data_parallel_size=3"], CONFIG, ["3", "--data_parallel_size"]),
        ("no data named", [], CONFIG, ["--train_data"]),
        ("missing file", [data("none.bin")], CONFIG, ["none.bin"]),
        ("glob without a match", [data("none*.bin")], CONFIG, ["none*.bin"]),
        ("folder as data", [data("folder.bin")], CONFIG, ["folder.bin"]),
        ("empty file", [data("empty.bin")], CONFIG, ["empty.bin"]),
        ("truncated file", [data("truncated.bin")], DATA, ["truncated.bin"]),
        ("odd number of bytes", [data("odd.bin")], DATA, ["odd.bin"]),
        ("fewer samples than a batch", [data("few.bin")], CONFIG, ["global_batch_size", "Mend"]),
        ("token out of vocabulary", [data("large_id.bin"), "--steps=60"], DATA, ["300", "large_id.bin"]),
        ("run directory under a file", [good, f"--run_dir={folder / 'file' / 'run'}"], CONFIG, ["--run_dir", "mend: "]),
        ("run directory of everybody", [good, f"--run_dir={folder / 'open'}"], CONFIG, ["--run_dir", "chmod"]),
        ("resume from nowhere", [good, f"--resume={folder / 'nowhere'}"], CONFIG, ["nowhere"]),
        ("weights from nowhere", [good, f"--init_from={folder / 'nowhere'}"], CONFIG, ["nowhere"]),
    ]


def check(bin_dir, folder, ranks, case):
    name, flags, code, words = case
    run_dir = folder / f"{name.replace(' ', '-')}-{ranks}"
    (folder / "open").mkdir(exist_ok=True)
    os.chmod(folder / "open", stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
    said = runs.run(bin_dir, "gpt", ranks, run_dir, [*GOOD, *flags], expect=code, timeout=60)
    missing = [word for word in words if word not in said]
    assert not missing, f"the message does not hold {missing}:\n{said[-2000:]}"
    for place in (run_dir, folder / "open"):
        checkpoints = list(place.glob("checkpoints/*")) if place.exists() else []
        assert not checkpoints, f"left behind: {checkpoints}"


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for case in cases(folder):
            for ranks in (1, 2):
                try:
                    if case[0] == "fewer micro-batches than ranks" and ranks == 1:
                        continue
                    check(bin_dir, folder, ranks, case)
                    print(f"{case[0]}, {ranks} ranks: exit {case[2]}", flush=True)
                except AssertionError as error:
                    failed += 1
                    print(f"FAILED {case[0]}, {ranks} ranks: {error}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
