"""The mesh of ranks: data parallel (dp) × context parallel (cp) × tensor parallel (tp), tp innermost."""

from dataclasses import dataclass

from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as a rank sees it: the ranks that differ from it along this axis alone.

    Attributes:
        size: how many they are, itself included.
        rank: its place among them.
        group: their process group; None if it is alone (but for `Mesh.dpcp`, which always has one among several ranks).
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def share(self, length: int) -> slice:
        """This rank's part of `length` things that divide evenly."""
        assert length % self.size == 0, f"{length} does not divide into {self.size}"
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


ALONE = Axis()


@dataclass(frozen=True)
class Mesh:
    """This rank's axes.

    Attributes:
        dp: ranks with other rows of the batch.
        cp: ranks with other parts of the same rows.
        tp: ranks with other parts of the weights, and the same tokens.
        dpcp: dp and cp together: all ranks with the same weights, over which ZeRO shards its state.
    """

    dp: Axis = ALONE
    cp: Axis = ALONE
    tp: Axis = ALONE
    dpcp: Axis = ALONE

    @classmethod
    def of(cls, device_type: str, world_size: int, cp: int = 1, tp: int = 1) -> "Mesh":
        """The mesh over all ranks of the running process group.

        Raises:
            ValueError: cp · tp does not divide the number of ranks.
        """
        if world_size % (cp * tp):
            raise ValueError(
                f"{world_size} ranks do not divide into parallel.cp={cp} × parallel.tp={tp}: start a multiple of "
                f"{cp * tp} ranks, or lower one of them"
            )
        if world_size == 1:
            return cls()
        axes = {"dp": world_size // (cp * tp), "cp": cp, "tp": tp}
        mesh = init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

        def axis(name: str, size: int) -> Axis:
            return Axis(size, mesh.get_local_rank(name), mesh.get_group(name)) if size > 1 else ALONE

        flat = mesh["dp", "cp"]._flatten("dpcp")
        dpcp = Axis(flat.size(), flat.get_local_rank(), flat.get_group())
        return cls(axis("dp", axes["dp"]), axis("cp", cp), axis("tp", tp), dpcp)

    @property
    def leads(self) -> bool:
        """Whether this rank counts for those with the same rows."""
        return self.cp.rank == 0 and self.tp.rank == 0

    def describe(self) -> str:
        """dp2 x cp1 x tp4"""
        return f"dp{self.dp.size} x cp{self.cp.size} x tp{self.tp.size}"
