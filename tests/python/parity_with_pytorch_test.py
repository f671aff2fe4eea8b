"""parity_with_pytorch_test.py BIN_DIR: one rank of lockstep and plain PyTorch train the same model from the same weights on the same batches, 30 steps of
AdamW with clipping and schedule. Losses agree to 2e-5 relative at every step, final parameters to 1e-4 of each tensor's largest value."""

import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "support"))
import runs

try:
    import torch

    import reference
except ImportError as error:
    print(f"SKIPPED: parity with PyTorch: {error}; cmake/setup.sh test installs it")
    sys.exit(77)

LOSS_BOUND, WEIGHT_BOUND, STEPS = 2e-5, 1e-4, 30
FAMILIES = {
    "gpt2": ["--model=gpt2", "--heads=4"],
    "llama": ["--model=llama", "--heads=4", "--kv_heads=2", "--tied_head=false"],
}


def train_pytorch(run_dir, data):
    config = json.loads((run_dir / "run.json").read_text())["config"]
    shape = {key.removeprefix("task."): value for key, value in config.items() if key.startswith("task.")}
    model = reference.Gpt(shape)
    model.load_state_dict(reference.read_weights(reference.newest_checkpoint(run_dir, step=0)))
    optimizer = reference.adamw(model, config, fused=False)
    batches = reference.Batches(data, shape["sequence_length"], config["global_batch_size"], config["seed"])
    losses = []
    for step in range(STEPS):
        tokens, targets = batches.step(step)
        loss = model(tokens, targets) / targets.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = reference.learning_rate(config, step)
        optimizer.step()
        losses.append(loss.item())
    return model, losses, shape


def is_noise(name, shape):
    """GPT-2's key bias has a gradient of zero in exact arithmetic; Adam makes full steps of its rounding noise."""
    return shape["model"] == "gpt2" and name.endswith("key.bias")


def check(family, binary, folder):
    data, run_dir = folder / "train.bin", folder / "run"
    runs.write_tokens(data, 40_000, seed=7)
    command = [binary, f"--run_dir={run_dir}", f"--train_data={data}", f"--steps={STEPS}", "--layers=2", "--width=64", "--sequence_length=48", "--global_batch_size=16",
               "--micro_batch_size=4", "--learning_rate=2e-3", "--warmup_steps=5", "--clip_norm=0.5", "--weight_decay=0.1", "--checkpoint_initial", "--seed=11", *FAMILIES[family]]
    subprocess.run(command, check=True, capture_output=True)
    model, losses, shape = train_pytorch(run_dir, data)
    ours = [line["loss"] for line in reference.read_metrics(run_dir)]
    assert len(ours) == STEPS, ours
    worst_loss = max(abs(a - b) / b for a, b in zip(ours, losses))
    weights = reference.read_weights(reference.newest_checkpoint(run_dir, step=STEPS))
    errors = {}
    for name, theirs in model.state_dict().items():
        if not is_noise(name, shape):
            errors[name] = ((weights[name] - theirs).abs().max() / theirs.abs().max()).item()
    worst = max(errors, key=errors.get)
    print(f"{family}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, worst relative difference {worst_loss:.1e} (bound {LOSS_BOUND}); weights {errors[worst]:.1e} in {worst} (bound {WEIGHT_BOUND})")
    assert losses[-1] < 0.8 * losses[0], "nothing was learnt, so nothing was tested"
    return worst_loss <= LOSS_BOUND and errors[worst] <= WEIGHT_BOUND


def main():
    torch.set_num_threads(1)
    good = True
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            good &= check(family, pathlib.Path(sys.argv[1], "gpt"), pathlib.Path(folder))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
