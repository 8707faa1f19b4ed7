"""The process group, its mesh and the few collectives that the training loop itself needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from riverrun.modeling.parallel.mesh import Mesh


@dataclass(frozen=True)
class Ranks:
    """One process' place among all ranks, along the axes of their mesh, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: Mesh = field(default_factory=Mesh)

    def total(self, *values: float) -> list[float]:
        """The sums of `values` over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def on_device(self, values: list[float]) -> torch.Tensor:
        """A float64 tensor of `values`, without waiting for the device."""
        tensor = torch.tensor(values, dtype=torch.float64)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (small and picklable), in the order of ranks."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, where alone it is called; a ValueError of its is raised on every rank."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = action()
            except ValueError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise ValueError(str(box[1]))
        return box[0]

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)  # else torch warns

    def set_timeout(self, minutes: float) -> None:
        """Of collectives from now on, in all of the mesh's groups."""
        axes = (self.mesh.dp, self.mesh.cp, self.mesh.tp, self.mesh.dpcp)
        for group in {id(g): g for g in (dist.group.WORLD, *(axis.group for axis in axes)) if g is not None}.values():
            dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def resolve_device(device: str, local_rank: int) -> torch.device:
    """The device that a recipe's `engine.device` (auto, cpu or cuda) means on this rank.

    Raises:
        ValueError: cuda was asked for and there is none, or fewer than local ranks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            "engine.device='cuda' but torch sees no CUDA device: set engine.device='auto' or 'cpu', or mend the driver "
            "(`nvidia-smi` should list a GPU, and torch must be a CUDA build)"
        )
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()} of them. "
            f"Start at most that many ranks a node (torchrun --nproc-per-node {torch.cuda.device_count()})"
        )
    return torch.device("cuda", local_rank)


def start(
    device: str, rank: int, world_size: int, local_rank: int, timeout_minutes: float, cp: int = 1, tp: int = 1
) -> Ranks:
    """Joins the process group: NCCL on CUDA, gloo on CPU.

    With several ranks the launcher's environment (MASTER_ADDR, MASTER_PORT) says where; one rank needs none.

    Raises:
        ValueError: no such device; ranks that do not divide into cp × tp.
    """
    place = resolve_device(device, local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if place.type == "cuda" else "gloo"
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    return Ranks(rank, world_size, local_rank, place, Mesh.of(place.type, world_size, cp, tp))


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
