"""Two processes that work on one batch."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def average(x):
    """The mean over the ranks; of one process, what it has."""
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def on_two_ranks(run, folder):
    """What `run(rank, world)` gives on each of two processes: a dict of tensors and plain values, or of such dicts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (2, port, run, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _worker(rank, world, port, run, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.save(run(rank, world), f"{folder}/{rank}.pt")
    dist.barrier()  # its threads are done with all tensors: torch 2.6 waits for them forever otherwise
    dist.destroy_process_group()
