"""The peer of the training rows: the same model, weights, batches and optimizer in PyTorch. Prints one JSON line: losses and step times.

Run alone for one process, or under torchrun for DDP over gloo. Tuned: fused AdamW, gradients set to none, no synchronisation inside the
timed part; --compile uses torch.compile; bench.py preloads tcmalloc.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "python"))
import torch
import torch.distributed as dist
import reference


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_dir", required=True, help="of lockstep's run with --checkpoint_initial: configuration, weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    config = json.loads(pathlib.Path(arguments.run_dir, "run.json").read_text())["config"]
    shape = {key.removeprefix("task."): value for key, value in config.items() if key.startswith("task.")}
    model = reference.Gpt(shape)
    model.load_state_dict(reference.read_weights(reference.newest_checkpoint(arguments.run_dir, step=0)))
    optimizer = reference.adamw(model, config)
    trained = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if arguments.compile:
        trained = torch.compile(trained)
    batches = reference.Batches(arguments.data, shape["sequence_length"], config["global_batch_size"], config["seed"])
    share = config["global_batch_size"] // world
    data = [tuple(part[rank * share:(rank + 1) * share] for part in batches.step(step)) for step in range(arguments.steps)]
    precision = torch.autocast("cpu", torch.bfloat16) if arguments.bf16 else contextlib.nullcontext()
    losses, times = [], []
    for step, (tokens, targets) in enumerate(data):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = trained(tokens, targets) / targets.numel()  # DDP averages over ranks of equal shares
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = reference.learning_rate(config, step)
        optimizer.step()
        losses.append(loss.detach())
        times.append(time.perf_counter() - start)
    total = torch.stack(losses)
    if world > 1:
        dist.all_reduce(total)
        total /= world
    if rank == 0:
        print(json.dumps({"losses": total.tolist(), "step_s": times}), flush=True)
    if world > 1:
        # gloo's threads now and then abort an orderly end ("terminate called without an active exception", torch 2.11, half of the one-step
        # runs), so none is tried. It saves the peer its leaving.
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main()
