"""checkpoint_dcp.py WHAT BYTES DIR, under torchrun: torch.distributed.checkpoint saves or loads BYTES over the ranks. Rank 0 prints the slowest rank's seconds."""

import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

what, size, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
numel = (16 << 20) // 4
state = {f"layer{i}.rank{rank}": torch.full((numel // 2048, 2048), float(i) if what == "save" else -1.0) for i in range(max(1, size // world // (16 << 20)))}
dist.barrier()
start = time.perf_counter()
if what == "save":
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
else:
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
if what == "load":
    assert all(bool((tensor == float(i)).all()) for i, tensor in enumerate(state.values()))
dist.all_reduce(took, dist.ReduceOp.MAX)
if rank == 0:
    print(f"{took.item():.6f}")
dist.barrier()
dist.destroy_process_group()
