"""A drill against silent corruption: what several ranks hold alike is compared bit by bit.

Ranks that share weights compute the same updates from the same gradients, so that their copies stay equal to the last
bit. A bit that flips in one rank's memory, or a collective that hands out different sums, makes them drift apart with a
loss that looks plausible. A checksum of each parameter, compared every few hundred steps, notices.

ZeRO stages 1 and 2: all parameters over the ranks of dp × cp, and over tp as well those that tensor parallelism does
not cut. Stage 3 keeps no copies.

Cost: one pass over the weights with some 100 MB of scratch memory, and 16 bytes from each rank. About 40 bytes are
moved a parameter: for 7B of them some 0.06 s of an H200's memory (reckoned, not measured); a CPU core does 100M/s.
"""

import socket
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import distributed as dist
from torch import nn

from riverrun.modeling.parallel.mesh import Mesh

PIECE = 2**22  # numbers at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # two of them for a number of 8 bytes
NAMED = 3  # parameters in a message
# a checksum is Σ wᵢ·bitsᵢ mod 2⁶⁴ with odd weights: one flipped bit changes it by an odd multiple of a power of two,
# which is never 0; two numbers that changed places are noticed as well
STRIDE, CARRY = 0x9E3779B97F4A7C16, 0x2545F4914F6CDD1D


class Replicas:
    """Compares this rank's copies of a model's parameters with the other ranks'.

    Args:
        model: as it trains, with DeepSpeed's mark on the parameters that tensor parallelism cuts.
        mesh: over all ranks of the default process group.
        zero_stage: 1 or 2.

    Raises:
        ValueError: stage 3, whose ranks hold parts of parameters and no copies.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, zero_stage: int):
        if zero_stage == 3:
            raise ValueError(
                "under engine.zero_stage=3 no two ranks hold the same weights, so that there are no replicas to "
                "compare: set engine.zero_stage to 1 or 2, or switch the comparison off"
            )
        self.mesh = mesh
        self.parameters = dict(model.named_parameters())
        self.cut = torch.tensor([bool(getattr(p, "tensor_model_parallel", False)) for p in self.parameters.values()])

    @torch.no_grad()
    def check(self) -> str | None:
        """Called on every rank alike. Returns, on every rank, which rank's copies differ, of which parameters; None:
        all are equal. Nothing is said of ranks that hold nothing in common."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world == 1:
            return None
        sums = checksums(list(self.parameters.values()))
        cut = self.cut.to(sums.device)
        # two numbers a rank: of what its column of tp has, and of what all have
        odd = 2 * torch.arange(len(sums), device=sums.device) + 1
        mixed = sums * odd
        totals = torch.stack([torch.where(cut, mixed, 0).sum(), torch.where(cut, 0, mixed).sum()])
        columns, everywhere = _gathered(totals, world).unbind(1)
        if all(_one_value(columns[ranks]) for ranks in self._columns(world)) and _one_value(everywhere):
            return None
        found = _gathered(sums, world)
        hosts: list[str] = [""] * world
        dist.all_gather_object(hosts, socket.gethostname())
        return describe(list(self.parameters), self.cut.tolist(), found.tolist(), self._columns(world), hosts)

    def _columns(self, world: int) -> list[list[int]]:
        """The ranks with the same place along tp, which is the innermost axis."""
        return [list(range(place, world, self.mesh.tp.size)) for place in range(self.mesh.tp.size)]


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(len(tensors),) int64 on their device: 64 bits of each that depend on every bit of it, whatever it means: NaNs
    and signs of zeros too."""
    device = tensors[0].device
    longest = max(1, *(tensor.numel() for tensor in tensors))
    weights = torch.arange(min(PIECE, longest), device=device) * _signed(STRIDE) + 1
    sums = []
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=device)
        for piece in bits.split(len(weights)):
            total = total * _signed(CARRY) + (piece.to(torch.int64) * weights[: len(piece)]).sum()
        sums.append(total)
    return torch.stack(sums)


def describe(
    names: Sequence[str],
    cut: Sequence[bool],
    sums: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    hosts: Sequence[str],
) -> str:
    """Which ranks differ from the majority of those that should equal them, and in what.

    Args:
        cut: of each parameter, whether only the ranks of a column share it; else all do.
        sums: of each rank, the checksums of its parameters.
        columns: ranks that have the same weights.
    """
    apart: dict[tuple[int, ...], list[str]] = {}  # ranks that differ: the parameters
    torn: dict[tuple[int, ...], list[str]] = {}  # without a majority: all of those ranks
    for index, name in enumerate(names):
        for ranks in columns if cut[index] else [range(len(sums))]:
            values = {rank: sums[rank][index] for rank in ranks}
            [(common, count), *others] = Counter(values.values()).most_common()
            if not others:
                continue
            if 2 * count > len(values):
                apart.setdefault(tuple(r for r, value in values.items() if value != common), []).append(name)
            else:
                torn.setdefault(tuple(ranks), []).append(name)
    assert apart or torn, "the totals differ, so that a checksum does"
    texts = []
    for ranks, differing in apart.items():
        texts.append(f"{_places(ranks, hosts)} {'has' if len(ranks) == 1 else 'have'} another {_list(differing)}")
    for ranks, differing in torn.items():
        which = "one of" if len(ranks) == 2 else "of"
        texts.append(
            f"{which} {_places(ranks, hosts)} {'has a wrong' if len(ranks) == 2 else 'no majority agrees on'} "
            f"{_list(differing)}"
        )
    return "weights that ranks share are no longer the same bits: " + "; ".join(texts)


def _gathered(values: torch.Tensor, world: int) -> torch.Tensor:
    """(world, n) on the CPU: every rank's `values` (n,)."""
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values)
    return torch.stack(parts).cpu()


def _one_value(values: torch.Tensor) -> bool:
    return bool((values == values[0]).all())


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number


def _places(ranks: Sequence[int], hosts: Mapping[int, str] | Sequence[str]) -> str:
    return ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
