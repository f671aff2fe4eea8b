"""all_reduce_gloo.py BYTES, under torchrun: gloo's all-reduce of f32. Rank 0 prints the median of the slowest rank's microseconds."""

import sys
import time

import torch
import torch.distributed as dist

numel = int(sys.argv[1]) // 4
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
x = torch.empty(numel)
for _ in range(3):  # also the warm-up
    torch.add(torch.arange(numel) % 1021, rank, out=x)
    dist.all_reduce(x)
    assert torch.equal(x, ((torch.arange(numel) % 1021) * size + sum(range(size))).float())
x.zero_()
batch, rounds = (20 if numel <= 4096 else 1), max(5, min(51, (1 << 30) // max(1, numel * 4)))
took = torch.empty(rounds, dtype=torch.float64)
for i in range(rounds):
    if batch == 1:
        x.zero_()  # what is summed in training has just been made by its rank
    dist.barrier()
    start = time.perf_counter()
    for _ in range(batch):
        dist.all_reduce(x)
    took[i] = (time.perf_counter() - start) / batch
dist.all_reduce(took, dist.ReduceOp.MAX)
if rank == 0:
    print(f"{took.median().item() * 1e6:.3f}")
dist.barrier()
dist.destroy_process_group()
