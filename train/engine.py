"""The training engine: a narrow class over DeepSpeed's ZeRO. The only file that imports deepspeed.

Precision of bf16 recipes: parameters and activations bf16; master weights, moments and accumulated gradients fp32.
- Stage 1 keeps parameters marked `keep_fp32` in fp32 in the forward too, reduces gradients in fp32 once a step, and
  supports Muon: DeepSpeed orthogonalises whole matrices after the reduction and the clipping.
- Stages 2 and 3 hold one type only: marked parameters run in bf16 (their master copies stay fp32), and gradients are
  averaged over the ranks micro batch by micro batch and accumulated in fp32.
- Stage 1 runs in `BF16_Optimizer` for fp32 recipes too, where "bf16" only means "with a master copy": one code path,
  and the only one of DeepSpeed's that clips the gradient before Muon and not Muon's update.

Settings whose defaults changed between DeepSpeed versions are set here and checked on the live engine.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import ALONE, Mesh
from riverrun.modeling.parallel.split import Split
from riverrun.train import optim
from riverrun.train.config import EngineConfig, OptimizerConfig, ParallelConfig, TrainConfig
from riverrun.train.data.packing import Batch
from riverrun.train.distributed import Ranks
from riverrun.train.objectives.objective import Objective
from riverrun.train.quiet import quiet
from riverrun.train.shards import MASTER, Shards, Universal, check_files, reading
from riverrun.train.state_passing import FOLDER, StateBuffer
from riverrun.train.zero_gradients import take_together

AUTO, NEXT_TOKEN = ParallelConfig(), Objective()
TAG = "zero"  # the folder of DeepSpeed's files in a checkpoint


@dataclass(frozen=True)
class Update:
    """What an optimiser step did: the gradient's norm before clipping, and whether the weights were left alone."""

    grad_norm: float
    skipped: bool


Judge = Callable[[float], bool]  # of the gradient's norm: whether the step must be skipped
Observe = Callable[[Batch, torch.Tensor], None]  # is given every micro batch, and this rank's part of its summed losses


class Engine:
    """Trains a model, its optimiser state sharded over all ranks that have the same weights.

    Every rank calls every method alike. The loss of a step is the mean over all targets of the global batch, however
    they are spread over ranks and micro batches.

    Args:
        model: on any device, in fp32, the same on every rank of `ranks.mesh.dpcp`: this rank's shard of it.
        accumulation: micro batches a rank and step.
        parallel: how context-parallel ranks share recurrences and attention.
        objective: what is minimised.

    Raises:
        ValueError: a combination of settings that would not train what it says.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        train: TrainConfig,
        engine: EngineConfig,
        ranks: Ranks,
        accumulation: int,
        parallel: ParallelConfig = AUTO,
        objective: Objective = NEXT_TOKEN,
    ):
        if optimizer.name == "muon" and engine.zero_stage != 1:
            raise ValueError(
                f"optimizer.name='muon' needs engine.zero_stage=1: stage {engine.zero_stage} would clip the "
                "orthogonalised update instead of the gradient"
            )
        self.ranks, self.accumulation, self.z_loss = ranks, accumulation, train.z_loss
        self.parallel, self.objective = parallel, objective
        self.dtype = torch.bfloat16 if train.dtype == "bf16" else torch.float32
        self.stage = engine.zero_stage
        # Muon's functions come decorated with torch.compile: not worth a compiler's start-up, so they run as they are
        muon = optimizer.name == "muon"
        self._eager = partial(torch.compiler.set_stance, "force_eager") if muon else contextlib.nullcontext
        self._save_error: Exception | None = None
        self.states: StateBuffer | None = None
        if train.state_passing.mode != "off":
            assert ranks.mesh.tp.size == ranks.mesh.cp.size == 1
            rows = accumulation * train.micro_batch_size
            layers = len(model.model.layers)  # type: ignore[arg-type, union-attr]
            self.states = StateBuffer(ranks.mesh.dp.rank * rows, rows, layers, ranks.device)
        with quiet():
            self._deepspeed = _build(model, optimizer, train, engine, ranks, accumulation, self.dtype)
            self._deepspeed.checkpoint_engine.save = self._save_file
            self._deepspeed.checkpoint_engine.load = _load_file
            if self.stage == 1:
                take_together(self._deepspeed.optimizer, ranks.mesh.tp)
        self._norms = sys.modules[type(self._deepspeed.optimizer).__module__]  # which looks whether norms are finite
        self._norm_is_invalid = self._norms.is_invalid_grad_norm
        self._write: Callable[[Any, Path], None] = torch.save
        self.module: nn.Module = self._deepspeed.module
        self._check(optimizer, train)

    def accumulate(self, batches: Sequence[Batch], observe: Observe = lambda batch, sums: None) -> torch.Tensor:
        """Forward and backward of this rank's micro batches of one step.

        Returns:
            This rank's part of the objective's summed losses, in nats: (losses,) float64 on the device.
        """
        assert len(batches) == self.accumulation, f"{len(batches)} micro batches instead of {self.accumulation}"
        device, mesh, objective = self.ranks.device, self.ranks.mesh, self.objective
        counted = [
            sum(part) if mesh.leads else 0 for part in zip(*map(objective.counts, batches))
        ]  # peers: the same rows
        counts = self.ranks.on_device(counted).float()
        torch.distributed.all_reduce(counts)
        # DeepSpeed averages over the ranks with the same weights; a loss without any prediction is 0
        normalisers = counts.clamp(min=1) / mesh.dpcp.size
        summed = torch.zeros(len(counted), dtype=torch.float64, device=device)
        for index, batch in enumerate(batches):
            self._deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss, parts = self._losses(batch, normalisers, index * len(batch.input_ids))
            summed += parts
            observe(batch, parts)
            # a loss that is not finite must not leave finite gradients: the whole step is to be skipped
            poison = torch.where(loss.detach().isfinite(), 1.0, float("nan"))
            self._deepspeed.backward(loss * poison, scale_wrt_gas=False)
        return summed

    def _losses(self, batch: Batch, normalisers: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised of a micro batch, whose rows are those from `start` on of this rank, and the objective's
        summed losses."""
        if not self.objective.needs_token_losses:
            options = {} if self.states is None else {"states": self.states.take(start, batch.carries)}
            out = self._forward(batch, num_targets=normalisers[0], z_loss=self.z_loss, **options)
            if self.states is not None:
                self.states.put(start, out.states)
            return out.loss, out.cross_entropy.double()[None]
        batch = batch.to(self.ranks.device)
        out = self._forward(batch, token_losses=True)
        parts = torch.stack(self.objective.losses(out.token_losses, batch))
        weights = parts.new_tensor(self.objective.weights)
        return (parts * weights / normalisers).sum(), parts.detach().double()

    def step(self, lr_factor: float, refuses: Judge = lambda norm: False) -> Update:
        """Clips, updates the weights unless the gradient of some rank is not finite, and forgets the gradient.

        Args:
            refuses: also skips the step if it says so, on all ranks alike. It is asked where DeepSpeed looks whether
                the norm is finite, and waits for the device anyway; not at all if DeepSpeed knows better before.
        """
        optim.set_lr(self._deepspeed.optimizer.param_groups, lr_factor)
        asked: list[float] = []

        def invalid(norm: Any) -> bool:
            if asked:  # DeepSpeed looks again when it clips
                return self._norm_is_invalid(norm)
            asked.append(float(norm))
            return refuses(asked[0]) or self._norm_is_invalid(norm)

        self._norms.is_invalid_grad_norm = invalid  # type: ignore[attr-defined]
        try:
            with self._eager():
                self._deepspeed.step()
        finally:
            self._norms.is_invalid_grad_norm = self._norm_is_invalid  # type: ignore[attr-defined]
        skipped = bool(self._deepspeed.optimizer.overflow)
        assert asked or skipped, "this version of DeepSpeed checks the gradient's norm elsewhere"
        return Update(asked[0] if asked else float("nan"), skipped)

    @torch.no_grad()
    def evaluate(self, batch: Batch, num_steps: int | None = None) -> torch.Tensor:
        """This rank's part of the batch's summed cross-entropy, in nats: a float64 scalar on the device.

        Args:
            num_steps: iterations of a recurrent-depth model; None: its mean.
        """
        options = {} if num_steps is None else {"num_steps": num_steps}
        self.module.eval()
        try:
            return self._forward(batch, num_targets=1, **options).cross_entropy.double()
        finally:
            self.module.train()

    @property
    def global_steps(self) -> int:
        """Optimiser steps so far, skipped ones counted."""
        return self._deepspeed.global_steps

    def save(self, folder: Path, write: Callable[[Any, Path], None] = torch.save, *, slices: bool = False) -> None:
        """Writes this rank's part of weights and optimiser state to `folder/zero`, on every rank, and the states that
        it passes to `folder/states`, which must be there.

        Args:
            write: is given each file's content and path. The content is the engine's own: the next step changes it.
            slices: `write` writes of a tensor that is a slice of a storage, as weights are, no more than the slice.
                `torch.save` would write the whole, so DeepSpeed copies weights to the host first.

        Raises:
            OSError: on the ranks where writing failed; no rank is left waiting in a collective.
        """
        self._save_error, self._write = None, write
        self._deepspeed.checkpoint_engine.preserves_storage_sharing = lambda: not slices
        with quiet():
            self._deepspeed.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self.states is not None:
            self._save_file(self.states.state(), str(folder / FOLDER / f"{self.ranks.rank:05d}.pt"))
        if self._save_error is not None:
            raise OSError(f"cannot write {folder / TAG}: {self._save_error}") from self._save_error

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, bit by bit, by ranks of the same layout with the same ZeRO stage."""
        with quiet():
            path, _ = self._deepspeed.load_checkpoint(str(folder), tag=TAG)
        assert path is not None, f"no DeepSpeed checkpoint in {folder}"

    @torch.no_grad()
    def adopt(self, source: Shards | Universal, plan: Mapping[str, Split | None]) -> None:
        """Takes weights and optimiser state from a checkpoint of any layout, a parameter at a time.

        Args:
            plan: how this engine's tensor-parallel ranks share the parameters.
        """
        tp, zero = self.ranks.mesh.tp, self._deepspeed.optimizer
        for flat, fragments in self._fragments():
            state: dict[str, Any] = zero.optimizer.state[flat]
            for name, start, numel, offset in fragments:
                for key in source.keys_of(name):
                    if key not in state and key != MASTER:
                        state[key] = torch.zeros_like(flat)
                    whole, split = source.read(name, key), plan.get(name)
                    shard = (whole if split is None or tp.size == 1 else split.take(whole, tp)).flatten()
                    target = flat if key == MASTER else state[key]
                    target[start : start + numel].copy_(shard[offset : offset + numel])
                # the fused AdamW, which is the one on CUDA, wants its count of steps on the device
                numbers = source.numbers_of(name)
                state |= {k: v.to(flat.device, copy=True) if torch.is_tensor(v) else v for k, v in numbers.items()}
        if self.stage < 3:
            zero.update_lp_params()
        else:
            for flat, low, parts in zip(
                zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, zero.fp16_partitioned_groups
            ):
                low.copy_(flat)
                for part, values in zip(parts, zero.unflatten(low, parts)):
                    part.data = values.data
        for name, count in source.counters.items():
            setattr(self._deepspeed, name, count)

    def _fragments(self) -> Iterator[tuple[torch.Tensor, list[tuple[str, int, int, int]]]]:
        """This rank's flat master weights; for every parameter in one: its name, where its piece starts and how long
        it is, and where that piece starts in the parameter."""
        zero = self._deepspeed.optimizer
        if self.stage == 3:
            rank = self.ranks.mesh.dpcp.rank
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups):
                fragments, start = [], 0
                for param in group:
                    part = param.partition_numel()
                    numel = max(0, min(part, param.ds_numel - rank * part))
                    fragments.append((zero.param_names[param], start, numel, rank * part))
                    start += part
                yield flat, fragments
            return
        flats = zero.fp32_groups_flat_partition if self.stage == 1 else zero.single_partition_of_fp32_groups
        for flat, group in zip(flats, zero.bf16_groups if self.stage == 1 else zero.bit16_groups):
            places = [(zero.param_names[param], param._hp_mapping) for param in group if param._hp_mapping is not None]
            yield (
                flat,
                [
                    (name, at.hp_fragment_address.start, at.hp_fragment_address.numel, at.lp_fragment_address.start)
                    for name, at in places
                ],
            )

    def _forward(self, batch: Batch, **options: Any) -> Any:
        cp, device = self.ranks.mesh.cp, self.ranks.device
        if cp.size == 1:
            batch = batch.to(device)
            options["cu_seqlens"] = batch.cu_seqlens
        else:
            rows, length = batch.input_ids.shape
            methods = self.parallel.linear, self.parallel.attention
            options["context"] = Context.of_rows(cp, rows, length, batch.cu_seqlens.tolist(), device, *methods)
            batch = batch.shard(cp.share(length)).to(device)
        options |= self.objective.model_inputs(batch)
        if batch.num_steps is not None:
            options["num_steps"] = batch.num_steps
        if batch.row_keys is not None:
            options["row_keys"] = batch.row_keys
        return self._deepspeed(input_ids=batch.input_ids, targets=batch.targets, **options)

    def _save_file(self, state_dict: Any, path: str) -> None:
        """DeepSpeed's writer, except that an error waits until the collectives of `save_checkpoint` are through."""
        try:
            self._write(state_dict, Path(path))
        except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's zip writer
            self._save_error = error

    def _check(self, optimizer: OptimizerConfig, train: TrainConfig) -> None:
        """The settings that are in force, read back from the live engine."""
        ds = self._deepspeed
        assert ds.zero_optimization_stage() == self.stage
        assert ds.gradient_clipping() == optimizer.grad_clip == ds.optimizer.clip_grad
        assert ds.gradient_accumulation_steps() == self.accumulation
        assert ds.train_micro_batch_size_per_gpu() == train.micro_batch_size
        assert ds.managed_gradient_accumulation() and ds.gradient_average
        assert ds.get_data_types()[1] == torch.float32, "gradients must be accumulated in fp32"
        assert ds.dp_world_size == self.ranks.mesh.dpcp.size
        assert ds.device.type == self.ranks.device.type
        assert type(ds.basic_optimizer).__name__ == {"adamw": "AdamW", "muon": "MuonWithAuxAdam"}[optimizer.name]
        if self.stage == 1:
            assert type(ds.optimizer).__name__ == "BF16_Optimizer"
            assert all(flat.dtype == torch.float32 for flat in ds.optimizer.fp32_groups_flat_partition)
            assert all(flat.dtype == torch.float32 for flat in ds.optimizer.fp32_groups_gradients_flat)
        elif self.dtype == torch.bfloat16 and self.stage == 2:
            assert ds.optimizer.check_grad_overflow, "a step that is not finite must be skipped"
        for param in self.module.parameters():
            fp32 = self.stage == 1 and getattr(param, "keep_fp32", False)
            assert param.dtype == (torch.float32 if fp32 else self.dtype)


def _load_file(path: str, map_location: Any = None) -> Any:
    """DeepSpeed's reader, but for one that builds nothing except tensors, plain values and DeepSpeed's own three
    classes: a file cannot run code."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with reading(path), torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)


def to_universal(folder: Path, out: Path) -> None:
    """Rewrites DeepSpeed's files in its universal format, whatever their layout.

    Raises:
        ValueError: a file that could run code: DeepSpeed's converter would let it.
    """
    check_files(folder)
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        from deepspeed.checkpoint import ds_to_universal

        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(folder),
                output_folder=str(out),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )


def versions() -> dict[str, str]:
    """Of the engine's libraries."""
    with quiet():
        import deepspeed

    return {"deepspeed": deepspeed.__version__}


def _build(model, optimizer, train, engine, ranks, accumulation, dtype) -> Any:
    """The DeepSpeed engine, built directly: `deepspeed.initialize` leaves no room for our own cast."""
    deepspeed = _deepspeed(ranks)
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups as groups_of_deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    class Zero(DeepSpeedEngine):
        def _cast_module_mixed_precision(self, *_: Any) -> None:
            for param in self.module.parameters():
                keep = engine.zero_stage == 1 and getattr(param, "keep_fp32", False)
                param.data = param.data.to(torch.float32 if keep else dtype)

        def _copy_recovery_script(self, *_: Any) -> None:
            """`train.shards` does its work; and an error here would leave the other ranks waiting."""

    model.to(ranks.device)
    for param in model.parameters():
        assert param.dtype == torch.float32, "the engine starts from fp32 weights"
    if whole := list({type(m) for m in model.modules() if getattr(m, "fetched_whole", False)}):
        set_z3_leaf_modules(model, whole)
    groups = optim.parameter_groups(model, optimizer)
    settings = _settings(optimizer, train, engine, ranks, accumulation)
    mpu = _ModelParallel(ranks.mesh) if ranks.mesh.tp.size > 1 else None
    groups_of_deepspeed.mpu = mpu  # which otherwise keeps that of an earlier engine of this process
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)  # DeepSpeed insists on finding it there
    deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False, verbose=False)
    return Zero(
        args=None,
        model=model,
        optimizer=_optimizer(groups, optimizer, ranks.device),
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
        dist_init_required=False,
        mpu=mpu,
    )


class _ModelParallel:
    """The mesh as DeepSpeed asks for it. Context-parallel peers are data-parallel ranks to it: they have the same
    weights, and gradients to be summed. It must not know of them as sequence-parallel ones, whose gradients it scales.
    """

    def __init__(self, mesh: Mesh):
        axes = {"model": mesh.tp, "tensor_model": mesh.tp, "data": mesh.dpcp, "pipeline_model": ALONE}
        for name, axis in axes.items():
            for what, value in (("rank", axis.rank), ("world_size", axis.size), ("group", axis.group)):
                setattr(self, f"get_{name}_parallel_{what}", lambda value=value: value)


def _deepspeed(ranks: Ranks) -> Any:
    """The deepspeed module, made to use this rank's device and to compile nothing."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    if ranks.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be built with a C++ compiler
        if get_accelerator().device_name() != "cpu":
            set_accelerator(CPU_Accelerator())
    return deepspeed


def _optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    if config.name == "adamw":
        for group in groups:
            del group["use_muon"]
        return optim.adamw(groups, device)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for param in group["params"]:
            param.use_muon = group["use_muon"]
        if group["use_muon"]:
            group["ns_method"] = "standard"  # Jordan's five Newton-Schulz steps in bf16, as torch.optim.Muon
    return MuonWithAuxAdam(groups, lambda aux: optim.adamw(aux, device))


def _settings(optimizer, train, engine, ranks, accumulation) -> dict[str, Any]:
    """DeepSpeed's configuration. Whatever changed its default between versions is explicit."""
    bf16 = engine.zero_stage == 1 or train.dtype == "bf16"
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": train.micro_batch_size * accumulation * ranks.mesh.dpcp.size,  # counts cp peers' rows again
        "gradient_clipping": optimizer.grad_clip,
        "bf16": {"enabled": bf16, "check_grad_overflow": True, "immediate_grad_update": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": []},
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": engine.overlap_comm,  # by default on in stage 3
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": 200_000_000,
            "allgather_bucket_size": 200_000_000,
            "load_from_fp32_weights": True,
            "elastic_checkpoint": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",  # of gradients; the default is bf16 wherever bf16 is enabled
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
        "dump_state": False,
        "checkpoint": {"tag_validation": "Ignore"},
    }
