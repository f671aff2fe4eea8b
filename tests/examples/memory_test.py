"""memory_test.py BIN_DIR: what a rank keeps of a 50 M-parameter GPT on 4 ranks, for each ZeRO stage, is within 10 % of the formula: bytes of
parameters, gradients, optimizer state, gathered units and buckets at their peaks, as the CPU allocator counts them, and shared memory where ranks
share a node; with LOCKSTEP_DEEP over MPI too. Scratch is printed beside it. Half of the model is its embedding, which the head uses too.

Formula (f32, P parameters, N ranks, U those of the embedding and one block, which are neighbours): stage 0: 16 P; 1: 8 P + 8 P/N; 2: 4 P + 12 P/N
+ buckets of U; 3: 16 P/N + gathered units and buckets of U. The head's gradient is a second one of the embedding, of which a piece is kept until
both are added: that is some of the 10 %. At stage 3 start-up never holds half of the model's parameters."""

import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

IS_DEEP = "LOCKSTEP_DEEP" in os.environ
RANKS, LAYERS, WIDTH, LENGTH, VOCABULARY = 4, 8, 512, 16, 50257
MODEL = [f"--layers={LAYERS}", f"--width={WIDTH}", "--heads=8", f"--sequence_length={LENGTH}", f"--vocab_size={VOCABULARY}"]
BLOCK, EMBEDDING = 12 * WIDTH * WIDTH + 13 * WIDTH, (VOCABULARY + LENGTH) * WIDTH
PARAMETERS = LAYERS * BLOCK + EMBEDDING + 2 * WIDTH


def formula(stage):
    p, n, units = 4 * PARAMETERS, RANKS, 4 * (EMBEDDING + BLOCK)
    return {0: 4 * p, 1: 2 * p + 2 * p / n, 2: p + 3 * p / n + units, 3: 4 * p / n + 2 * units}[stage]


def main():
    bin_dir = pathlib.Path(sys.argv[1])
    print(f"{PARAMETERS / 1e6:.1f} M parameters on {RANKS} ranks, MB:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "gpt.bin")
        runs.write_tokens(data, 5_000)
        for stage, backend in [(stage, "auto") for stage in range(4)] + [(1, "mpi")] * IS_DEEP:
            run_dir = pathlib.Path(folder, f"{stage}-{backend}")
            runs.run(bin_dir, "gpt", RANKS, run_dir, [f"--train_data={data}", "--steps=2", "--checkpoint_interval_steps=0", "--eval_interval_steps=0", "--global_batch_size=4",
                                                      "--micro_batch_size=1", f"--backend={backend}", f"--zero_stage={stage}", *MODEL])
            peaks = json.loads((run_dir / "ledger.jsonl").read_text().splitlines()[-1])["peak_bytes"]
            kept = sum(peaks[kind] for kind in ("parameters", "gradients", "optimizer", "gathered", "buckets"))
            ratio = kept / formula(stage)
            print(f"stage {stage}, {backend}: {kept / 1e6:.1f}, formula {formula(stage) / 1e6:.1f}, ratio {ratio:.3f};", {kind: round(value / 1e6, 1) for kind, value in peaks.items()}, flush=True)
            assert 0.9 <= ratio <= 1.1, f"stage {stage} on {backend} keeps {kept} bytes, the formula says {formula(stage)}"
            if stage == 3:
                assert peaks["parameters"] < 4 * PARAMETERS / 2, f"start-up held {peaks['parameters']} bytes of parameters, of {4 * PARAMETERS}"


if __name__ == "__main__":
    main()
