"""checkpoint_dcp.py WHAT BYTES DIR, under torchrun: torch.distributed.checkpoint saves, loads, or saves in the background BYTES over the ranks. Rank 0 prints the slowest rank's seconds; of a save in the background (the second, so that all is warm), those until it returns."""

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
state = {f"layer{i}.rank{rank}": torch.full((numel // 2048, 2048), -1.0 if what == "load" else float(i)) for i in range(max(1, size // world // (16 << 20)))}
if what == "stall":
    dcp.async_save(state, storage_writer=dcp.FileSystemWriter(f"{folder}/first", sync_files=True)).result()
dist.barrier()
start = time.perf_counter()
if what == "save":
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=True))
elif what == "stall":
    under_way = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(f"{folder}/second", sync_files=True))
else:
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder))
took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
if what == "stall":
    under_way.result()
if what == "load":
    assert all(bool((tensor == float(i)).all()) for i, tensor in enumerate(state.values()))
dist.all_reduce(took, dist.ReduceOp.MAX)
if rank == 0:
    print(f"{took.item():.6f}")
dist.barrier()
dist.destroy_process_group()
