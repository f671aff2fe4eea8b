"""tier_b_test.py BIN_DIR: where bits change (tensor and context parallelism, precision), they change by rounding. After 20 steps every parameter is compared with
the one-process run's: max|a-b| / max|b| of each tensor, within the printed bounds. GPT-2's key bias is left out: its gradient is zero in exact arithmetic and
Adam makes full steps of its rounding noise."""

import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

try:
    import safetensors
    import torch

    import reference
except ImportError as error:
    print(f"SKIPPED: tier B: {error}; cmake/setup.sh test installs it")
    sys.exit(77)

BOUND, BF16_BOUND = 1e-4, 1e-1
COMMON = ["--steps=20", "--checkpoint_interval_steps=0", "--eval_interval_steps=0", "--learning_rate=2e-3", "--warmup_steps=5", "--log_interval_steps=1000",
          "--layers=2", "--width=48", "--heads=12", "--sequence_length=24", "--global_batch_size=16", "--micro_batch_size=2", "--vocab_size=257"]
MODELS = {"gpt2": ["--model=gpt2"], "llama": ["--model=llama", "--kv_heads=4", "--tied_head=false"]}
LAYOUTS = [(2, ["--tensor_parallel_size=2"]), (3, ["--tensor_parallel_size=3", "--sequence_parallel"]), (4, ["--tensor_parallel_size=4", "--sequence_parallel"]),
           (2, ["--context_parallel_size=2"]), (4, ["--context_parallel_size=4"]), (4, ["--tensor_parallel_size=2", "--zero_stage=3"]),
           (8, ["--tensor_parallel_size=2", "--sequence_parallel", "--context_parallel_size=2", "--pipeline_parallel_size=2", "--recompute=selective"]),
           (2, ["--tensor_parallel_size=2", "--precision=bf16"]), (1, ["--precision=bf16"])]


def whole_weights(checkpoint):
    """Weights put together from the boxes that the files hold."""
    weights = {}
    pieces = {}
    for shard in sorted(pathlib.Path(checkpoint).glob("*.safetensors")):
        with safetensors.safe_open(shard, framework="pt") as file:
            offsets = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in file.keys():
                if ":" not in name:
                    pieces.setdefault(name, []).append((offsets.get(name, {}).get("saved_offsets"), file.get_tensor(name)))
    for name, boxes in pieces.items():
        if len(boxes) == 1:
            weights[name] = boxes[0][1]
            continue
        size = [max(offset[dim] + box.shape[dim] for offset, box in boxes) for dim in range(boxes[0][1].dim())]
        weights[name] = torch.full(size, float("nan"))
        for offset, box in boxes:
            weights[name][tuple(slice(begin, begin + length) for begin, length in zip(offset, box.shape))] = box
    return weights


def train(bin_dir, folder, data, name, ranks, flags):
    run_dir = pathlib.Path(folder, name)
    runs.run(bin_dir, "gpt", ranks, run_dir, [f"--train_data={data}", *COMMON, *flags])
    return whole_weights(reference.newest_checkpoint(run_dir))


def main():
    bin_dir, good = pathlib.Path(sys.argv[1]), True
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "gpt.bin")
        runs.write_tokens(data, 20_000)
        for model, flags in MODELS.items():
            expected = train(bin_dir, folder, data, model, 1, flags)
            for number, (ranks, layout) in enumerate(LAYOUTS):
                weights = train(bin_dir, folder, data, f"{model}-{number}", ranks, flags + layout)
                assert weights.keys() == expected.keys()
                errors = {name: ((weights[name] - b).abs().max() / b.abs().max()).item() for name, b in expected.items() if not (model == "gpt2" and name.endswith("key.bias"))}
                worst = max(errors, key=errors.get)
                bound = BF16_BOUND if "--precision=bf16" in layout else BOUND
                good &= errors[worst] <= bound
                print(f"{model} on {ranks} ranks {' '.join(layout)}: {errors[worst]:.1e} in {worst} (bound {bound:.0e})", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
