"""The peer of the training rows: the same model, weights, batches and optimizer in PyTorch. Prints one JSON line: losses and step times.

Run alone for one process, or under torchrun over gloo for DDP, FSDP2 (--fsdp) or DTensor's tensor parallelism (--tensor). Tuned: fused AdamW,
gradients set to none, no synchronisation inside the timed part; --compile uses torch.compile; bench.py preloads tcmalloc.
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
import torch.distributed.tensor.parallel as tensor_parallel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
import reference


def blocks(model):
    return [module for module in model.children() if isinstance(module, reference.Block)]


def shard_fully(model, reshard, bf16):
    """FSDP2, each block and the rest; `reshard` frees a block after its forward."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*blocks(model), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    return model


def cut_tensors(model):
    """Attention by heads, MLP by its hidden width. One product for query, key and value: three would all-reduce three times in backward."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"qkv": tensor_parallel.ColwiseParallel(), "projection": tensor_parallel.RowwiseParallel(),
            "up": tensor_parallel.ColwiseParallel(), "down": tensor_parallel.RowwiseParallel()}
    if model.c["model"] == "llama":
        plan["gate"] = tensor_parallel.ColwiseParallel()
    for block in blocks(model):
        tensor_parallel.parallelize_module(block, mesh, plan)
    return model


def clip(parameters, limit):
    """clip_grad_norm_ for parameters of which some are cut over all ranks: one all-reduce, on local parts."""
    whole, parts = [], []
    for p in parameters:
        is_cut = isinstance(p.grad, DTensor) and p.grad.placements[0].is_shard()
        (parts if is_cut else whole).append(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad)
    square = torch.nn.utils.get_total_norm(parts) ** 2
    dist.all_reduce(square)
    if whole:
        square += torch.nn.utils.get_total_norm(whole) ** 2
    torch._foreach_mul_(whole + parts, torch.clamp(limit / (square.sqrt() + 1e-6), max=1.0))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_dir", required=True, help="of lockstep's run with --checkpoint_initial: configuration, weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fsdp", choices=["reshard", "keep"], help="FSDP2: blocks are freed after their forward, or kept for backward")
    parser.add_argument("--tensor", action="store_true", help="tensor parallelism over all ranks")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    config = json.loads(pathlib.Path(arguments.run_dir, "run.json").read_text())["config"]
    shape = {key.removeprefix("task."): value for key, value in config.items() if key.startswith("task.")}
    model = reference.Gpt(shape)
    model.load_state_dict(reference.read_weights(reference.newest_checkpoint(arguments.run_dir, step=0)))
    for block in blocks(model):
        block.fuse(world if arguments.tensor else 1)
    cut = arguments.tensor or arguments.fsdp
    if arguments.tensor:
        trained = cut_tensors(model)
    elif arguments.fsdp:
        trained = shard_fully(model, arguments.fsdp == "reshard", arguments.bf16)
    else:
        trained = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = reference.adamw(model, config)
    if arguments.compile:
        trained = torch.compile(trained)
    batches = reference.Batches(arguments.data, shape["sequence_length"], config["global_batch_size"], config["seed"])
    replicas, replica = (1, 0) if arguments.tensor else (world, rank)
    share = config["global_batch_size"] // replicas
    data = [tuple(part[replica * share:(replica + 1) * share] for part in batches.step(step)) for step in range(arguments.steps)]
    precision = torch.autocast("cpu", torch.bfloat16) if arguments.bf16 and not arguments.fsdp else contextlib.nullcontext()
    losses, times = [], []
    for step, (tokens, targets) in enumerate(data):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with precision:
            loss = trained(tokens, targets) / targets.numel()  # DDP and FSDP average over ranks of equal shares
        loss.backward()
        if cut:
            clip(model.parameters(), config["clip_norm"])
        else:
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
