"""A sum over processes, of this machine or of several: the smallest test that collectives work."""

import subprocess
import sys
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
    device = _device(backend, rank)
    dist.init_process_group(
        backend,
        init_method=Path(folder, "store").as_uri(),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=1),
    )
    Path(folder, f"sum{rank}").write_text(str(_sum(rank, device)))


def _device(backend: str, index: int) -> torch.device:
    device = torch.device("cpu" if backend == "gloo" else f"cuda:{index}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _sum(rank: int, device: torch.device) -> float:
    """Of rank + 1 over the ranks of the process group, which is left then."""
    try:
        value = torch.full((1024,), rank + 1.0, device=device)
        dist.all_reduce(value)
        assert bool((value == value[0]).all())
        return value[0].item()
    finally:
        dist.destroy_process_group()


class Meeting:
    """A place where ranks of several machines find each other, kept by one of them while it is entered."""

    def __init__(self, keeper: bool):
        self.store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False) if keeper else None
        self.port = self.store.port if self.store is not None else 0

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, *_: object) -> None:
        self.store = None


def sum_over_nodes(backend: str, rank: int, world: int, host: str, port: int, seconds: float) -> str:
    """Adds up rank + 1 over one process a machine, on its first GPU with NCCL. Returns what went wrong, or "".

    In a process of its own, since one that waits in NCCL for a machine that does not answer cannot be called back.
    """
    arguments = [backend, str(rank), str(world), host, str(port), str(seconds)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "riverrun.launch.all_reduce", *arguments],
            capture_output=True, text=True, timeout=seconds + 30, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds + 30:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    expected, got = world * (world + 1) / 2, done.stdout.strip()
    return "" if got == str(expected) else f"the sum of 1 to {world} came out as {got}"


def _main(backend: str, rank: str, world: str, host: str, port: str, seconds: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=float(seconds))
    device = _device(backend, 0)
    store = dist.TCPStore(host, int(port), is_master=False, timeout=patience)
    dist.init_process_group(backend, store=store, rank=int(rank), world_size=int(world), timeout=patience)
    print(_sum(int(rank), device))


if __name__ == "__main__":
    _main(*sys.argv[1:])
