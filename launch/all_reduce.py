"""A sum over two local processes: the smallest test that collectives work here."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def all_reduce_sums(backend: str) -> list[float]:
    """What each of two ranks gets for the sum of rank + 1, which is 3.

    Raises:
        Exception: a rank failed or the ranks did not meet within a minute; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(backend, folder), nprocs=WORLD)
        return [float(Path(folder, f"sum{rank}").read_text()) for rank in range(WORLD)]


def _rank(rank: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu" if backend == "gloo" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=1),
    )
    try:
        value = torch.full((1024,), rank + 1.0, device=device)
        dist.all_reduce(value)
        assert bool((value == value[0]).all())
        Path(folder, f"sum{rank}").write_text(str(value[0].item()))
    finally:
        dist.destroy_process_group()
