"""Processes that train, for the tests here and in tests/train.

They are forked from a server that has imported everything already, so that a rank costs a fraction of a second.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.muon import original_muon
from torch import nn
from transformers.utils import ModelOutput

from riverrun.modeling.projection import project
from riverrun.train import distributed, interrupt, loop, manifest, outcome
from riverrun.train import engine as engines
from riverrun.train.config import EngineConfig, OptimizerConfig, Recipe, TrainConfig
from riverrun.train.data.packing import Batch
from riverrun.train.inputs import Inputs
from riverrun.train.objectives.objective import Objective
from riverrun.train.recurrence import Recurrence
from riverrun.train.saver import Saver
from riverrun.train.shards import Shards
from tests.ranks import PRELOAD, meet_at, meeting_place

VOCAB, WIDTH, ROWS, LENGTH, MICRO_BATCHES, STEPS = 32, 16, 2, 9, 4, 4
LR, MUON_LR, CLIP, DECAY, Z_LOSS = 1e-2, 2e-2, 0.5, 0.1, 1e-3
CASES = {
    "adamw-fp32-1": ("adamw", "fp32", 1),
    "adamw-fp32-2": ("adamw", "fp32", 2),
    "adamw-fp32-3": ("adamw", "fp32", 3),
    "adamw-bf16-1": ("adamw", "bf16", 1),
    "adamw-bf16-2": ("adamw", "bf16", 2),
    "adamw-bf16-3": ("adamw", "bf16", 3),
    "muon-fp32-1": ("muon", "fp32", 1),
    "muon-bf16-1": ("muon", "bf16", 1),
}


def start(
    function: Callable[..., None], *args: Any, world: int = 1, tp: int = 1, cp: int = 1, log: Path
) -> list[multiprocessing.Process]:
    """Runs `function(ranks, *args)` in `world` processes of one process group; their output goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    store = meeting_place()
    processes = [
        context.Process(target=_rank, args=(function, args, rank, world, cp, tp, store.port, log))
        for rank in range(world)
    ]
    # for the server, to which Python 3.11 does not hand on the path; later tests keep their own environment
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        for process in processes:
            process.start()
    processes[0].store = store  # type: ignore[attr-defined] # kept as long as they are
    return processes


def run(function: Callable[..., None], *args: Any, **layout: Any) -> list[int | None]:
    """`start`, and the exit codes once all are done; when one is killed, those that wait for it are killed too."""
    processes = start(function, *args, **layout)
    while any(p.is_alive() for p in processes):
        if any(p.exitcode == -signal.SIGKILL for p in processes):
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [p.exitcode for p in processes]


def read(log: Path) -> str:
    return log.read_text() if log.exists() else "no rank came so far as to write a log"


def _rank(function, args, rank, world, cp, tp, port, log):
    meet_at(port)
    torch.set_num_threads(1)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        function(distributed.start("cpu", rank, world, rank, 2, cp, tp), *args)
    finally:
        sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            distributed.stop()


# A tiny model for the engine


@dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    cross_entropy: torch.Tensor | None = None
    token_losses: torch.Tensor | None = None


class Scale(nn.Module):
    """A vector that asks to stay in fp32 and not to decay."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.linspace(0.5, 1, WIDTH))
        self.A_log.keep_fp32 = self.A_log.no_weight_decay = True

    def forward(self, x):
        return (x.float() * self.A_log.float().exp()).to(x.dtype)


class Tiny(nn.Module):
    """The training interface of `RiverrunForCausalLM`, over an MLP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.norm = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down, self.scale = nn.Linear(3 * WIDTH, WIDTH), Scale()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=1)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, targets, cu_seqlens=None, num_targets=None, z_loss=0.0, token_losses=False, late=None):
        x = self.emb(input_ids)
        gate, up = project(self.norm(x), self.gate, self.up)
        x = x + self.down(F.silu(gate) * up)
        x = self.scale(self.conv(x.mT).mT)
        logits = self.head(x).float().flatten(0, 1)
        if token_losses:
            assert late is not None and late.shape == targets.shape
            ce = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")
            return Output(token_losses=ce.view(targets.shape))
        ce = F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
        z = z_loss * (torch.logsumexp(logits, -1).square() * (targets.flatten() != -100)).sum()
        return Output((ce + z) / num_targets, ce.detach())


def batch(tokens, labels):
    rows, length = labels.shape
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    return Batch(tokens, labels, bounds, int((labels != -100).sum()))


def batches(step, number=MICRO_BATCHES):
    """All micro batches of a step; the first ones have fewer targets."""
    generator = torch.Generator().manual_seed(100 + step)
    out = []
    for index in range(number):
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[:, : 2 * (number - index) - 1] = -100
        out.append(batch(tokens[:, :-1], labels))
    return out


class Halves(Objective):
    """Early and late predictions of a row, each with a mean and a weight of its own."""

    names, weights = ("loss", "late"), (1.0, 0.25)

    def counts(self, batch):
        late = int(((batch.targets != -100) & batch.extra["late"]).sum())
        return batch.num_targets - late, late

    def model_inputs(self, batch):
        return {"late": batch.extra["late"]}

    def losses(self, token_losses, batch):
        late = batch.extra["late"]
        return token_losses[~late].sum(), token_losses[late].sum()


def halved(batch):
    late = (torch.arange(LENGTH) >= LENGTH // 2 + 1).expand(batch.targets.shape)
    return replace(batch, extra={"late": late})


def train_halves(ranks: distributed.Ranks, stage: int) -> dict[str, Any]:
    """A step with two losses."""
    accumulation = MICRO_BATCHES // ranks.world_size
    mine = [halved(b) for b in batches(0)[ranks.rank * accumulation : (ranks.rank + 1) * accumulation]]
    train = TrainConfig(micro_batch_size=ROWS, dtype="fp32")
    optimizer, engine = OptimizerConfig(lr=LR), EngineConfig(zero_stage=stage)
    trained = engines.Engine(Tiny(), optimizer, train, engine, ranks, accumulation, objective=Halves())
    sums = ranks.total(*trained.accumulate(mine).tolist())
    return {"sums": sums, "norm": trained.step(1.0).grad_norm}


def train_tiny(ranks: distributed.Ranks, folder: Path) -> None:
    """Every case of `CASES`: writes its losses, gradient norms and final master weights to FOLDER/<case>.pt."""
    accumulation = MICRO_BATCHES // ranks.world_size
    mine = slice(ranks.rank * accumulation, (ranks.rank + 1) * accumulation)
    for case, (optimizer, dtype, stage) in CASES.items():
        if case == "muon-fp32-1":  # the test compares in fp32 what DeepSpeed does in bf16
            original_muon.ns_compute_dtype = lambda method: torch.float32
        engine = engines.Engine(
            Tiny(),
            OptimizerConfig(name=optimizer, lr=LR, muon_lr=MUON_LR, weight_decay=DECAY, grad_clip=CLIP),
            TrainConfig(micro_batch_size=ROWS, dtype=dtype, z_loss=Z_LOSS),
            EngineConfig(zero_stage=stage),
            ranks,
            accumulation,
        )
        losses, norms = [], []
        for step in range(STEPS):
            (total,) = ranks.total(engine.accumulate(batches(step)[mine]).item())
            losses.append(total / sum(b.num_targets for b in batches(step)))
            norms.append(engine.step(1 - step / STEPS).grad_norm)
        (held_out,) = ranks.total(sum(engine.evaluate(b).item() for b in batches(99)[mine]))
        engine.save(folder / case)
        weights = dict(Shards(folder / case / engines.TAG, {}))
        given: list[dict] = []
        engine.save(folder / f"{case}-given", lambda value, path, to=given: to.append(value), slices=True)
        if ranks.rank == 0 and stage < 3:
            own = {p.data_ptr() for p in engine.module.parameters()}
            (states,) = (value["module"] for value in given if "module" in value)
            assert {tensor.data_ptr() for tensor in states.values()} == own, "copied by DeepSpeed"
        if stage < 3:  # stage 3's weights cannot be touched from here
            skip_a_step(engine, ranks, batches(STEPS)[mine], folder / case / "after", weights)
        if ranks.rank == 0:
            result = {"losses": losses, "norms": norms, "weights": weights, "held_out": held_out}
            torch.save(result, folder / f"{case}.pt")
    norms_of_sums = {stage: accumulate_many(ranks, stage) for stage in (1, 2)}
    if ranks.rank == 0:
        torch.save(norms_of_sums, folder / "accumulation.pt")
    halves = {stage: train_halves(ranks, stage) for stage in (1, 2, 3)}
    if ranks.rank == 0:
        torch.save(halves, folder / "halves.pt")


def accumulate_many(ranks: distributed.Ranks, stage: int) -> tuple[float, float, float]:
    """The norm of a gradient summed over 32 micro batches: the engine's, and of sums in fp32 and in bf16."""
    number = 32
    settings = OptimizerConfig(), TrainConfig(micro_batch_size=ROWS), EngineConfig(zero_stage=stage)
    engine = engines.Engine(Tiny(), *settings, ranks, number)
    step = batches(0, number=number)
    params = list(engine.module.parameters())
    fp32, bf16 = [p.detach().float() * 0 for p in params], [p.detach().bfloat16() * 0 for p in params]
    for b in step:
        total = sum(other.num_targets for other in step)
        loss = engine.module(b.input_ids, b.targets, num_targets=torch.tensor(float(total))).loss
        for exact, rounded, gradient in zip(fp32, bf16, torch.autograd.grad(loss, params)):
            exact += gradient.float()
            rounded += gradient.bfloat16()
    engine.accumulate(step)  # every rank has the same batches: the mean over ranks is each rank's sum
    norms = [math.sqrt(sum(t.double().square().sum().item() for t in sums)) for sums in (fp32, bf16)]
    return engine.step(0.0).grad_norm, norms[0], norms[1]


def skip_a_step(engine, ranks, step, folder, before) -> None:
    """A gradient that is not finite on one rank only: all ranks skip the step, and go on after it."""
    weight = engine.module.scale.A_log
    kept = weight.detach().clone()
    if ranks.rank == ranks.world_size - 1:
        weight.data.fill_(float("inf"))
    engine.accumulate(step)
    update = engine.step(1.0)
    assert update.skipped and engine.global_steps == STEPS + 1
    weight.data.copy_(kept)
    engine.save(folder)
    after = dict(Shards(folder / engines.TAG, {}))
    assert before.keys() == after.keys() == dict(Tiny().named_parameters()).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.accumulate(step)
    assert not engine.step(1.0).skipped


# Whole runs of a small recipe on generated data


def recipe(**sections: dict[str, Any]) -> Recipe:
    """20 steps on 8 rows of 16 tokens, saved every 4 steps."""
    values: dict[str, Any] = {
        "model": {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "layer_pattern": ["mamba2", "attention"],
            "mamba2": {"head_dim": 16, "chunk_size": 8},
            "attention": {"head_dim": 16},
        },
        "data": {"seq_len": 16, "train": [{"path": "generated"}]},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "log_every": 3, "eval_every": 10},
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup_steps": 2},
        "checkpoint": {"every": 4, "keep": 2, "asynchronous": False},
        "guard": {"window": 8},
        "log": {"tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    loaded = Recipe.model_validate(values)
    return loaded.model_copy(update={"model": loaded.model.resolve()})


class Counting:
    """Rows that count up from a random start: learnable, and a pure function of the step."""

    def __init__(
        self,
        config: Recipe,
        ranks: distributed.Ranks,
        at: dict[int, Callable[[], None]],
        bad: Collection[int] = (),
        missing: range = range(0),
    ):
        self.config, self.ranks, self.at, self.bad, self.missing = config, ranks, at, bad, missing

    def step(self, step: int) -> list[Batch]:
        if self.missing and step >= self.missing.start:
            step += len(self.missing)
        self.at.get(step, lambda: None)()
        train, length = self.config.train, self.config.data.seq_len
        generator = torch.Generator().manual_seed(step)
        begin = torch.randint(0, 64, (train.global_batch_size, 1), generator=generator)
        tokens = (begin + torch.arange(length + 1)) % 64
        if step in self.bad:
            tokens = torch.zeros_like(tokens)  # which is what `spoil` goes by
        mine = tokens.chunk(self.ranks.mesh.dp.size)[self.ranks.mesh.dp.rank]
        made = [batch(rows[:, :-1], rows[:, 1:].contiguous()) for rows in mine.split(train.micro_batch_size)]
        if (depth := self.config.model.depth) is None:
            return made
        recurrence = Recurrence(depth, train.recurrence, train.seed)
        keys = recurrence.row_keys(range(len(mine))).split(train.micro_batch_size)
        depths = recurrence.steps(step, len(made))
        return [replace(b, num_steps=n, row_keys=key) for b, n, key in zip(made, depths, keys)]


@dataclass
class HeldOut:
    data: Counting

    def batches(self) -> list[Batch]:
        return [replace(b, num_steps=None, row_keys=None) for b in self.data.step(10**6)]


def flip_a_bit(step: int) -> None:
    """Of a weight of this rank, after that step."""
    take = engines.Engine.step

    def flipping(engine: engines.Engine, *args: Any) -> engines.Update:
        update = take(engine, *args)
        if engine.global_steps == step:
            weight = dict(engine.module.named_parameters())["model.norm.weight"]
            weight.data.view(torch.int16)[3] ^= 1
        return update

    engines.Engine.step = flipping  # type: ignore[method-assign]


def obey_permissions() -> None:
    """Takes from root, in this thread and those that it starts, the right to write what nobody may write."""
    if os.geteuid() != 0:
        return
    libc, override = ctypes.CDLL(None, use_errno=True), 1 << 1  # CAP_DAC_OVERRIDE
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this thread
    assert libc.capget(header, sets) == 0
    sets[0] &= ~override
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def spoil(factor: float, here: bool) -> None:
    """Losses of bad batches are multiplied, and their gradients: on this rank, if `here`."""
    losses = engines.Engine._losses

    def spoilt(engine: engines.Engine, batch: Batch, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, parts = losses(engine, batch, *rest)
        bad = here and not batch.input_ids.any()
        return (loss * factor, parts * factor) if bad else (loss, parts)

    engines.Engine._losses = spoilt  # type: ignore[method-assign]


def train_run(
    ranks: distributed.Ranks, config: Recipe, run_dir: Path, resume: str = "auto", fault: str = "", at: int = -1
) -> None:
    """`loop.run` on generated data, with a fault injected at step `at`. Exits with the outcome's code."""
    last = ranks.rank == ranks.world_size - 1

    def send(number: int) -> Callable[[], None]:
        return lambda: os.kill(os.getpid(), number) if last else None

    def twice() -> None:
        send(signal.SIGINT)()
        time.sleep(1.2)
        send(signal.SIGINT)()

    def ask(reason: outcome.Reason) -> Callable[[], None]:
        def request() -> None:
            if last:
                outcome.request_stop(run_dir, reason)
                time.sleep(interrupt.POLL_SECONDS)  # these steps are so short that the run could end before it looks

        return request

    def wait() -> None:
        (run_dir / "waiting").touch()
        threading.Event().wait()

    def fill() -> None:
        with contextlib.suppress(OSError), (run_dir.parent / "filler").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    def freeze() -> None:
        for folder in (run_dir / "checkpoints", run_dir):
            folder.chmod(0o555)

    def other_depths() -> None:
        if last:
            Recurrence.steps = lambda self, place, number: [(9, 1)] * number  # type: ignore[method-assign]

    faults = {
        "other depths": other_depths,
        "usr1": send(signal.SIGUSR1),
        "ask stop": ask("stop"),
        "ask requeue": ask("requeue"),
        "wait": wait,
        "full": fill,
        "read-only": freeze,
        "kill": send(signal.SIGKILL),
        "int": send(signal.SIGINT),
        "term": send(signal.SIGTERM),
        "int twice": twice,
    }
    bad: Collection[int] = ()
    if fault in ("nan", "spike"):
        bad = [at]
        spoil(float("nan") if fault == "nan" else 50.0, last)
    elif fault.startswith("bad data"):
        bad = range(at, 10**9 if "for ever" in fault else at + 3)
        spoil(float("nan"), last)
    elif fault == "high losses for ever":
        bad = range(at, 10**9)
        spoil(50.0, last)
    when = {at: faults[fault]} if fault in faults else {17: faults["kill"]} if "then kill" in fault else {}
    if fault == "read-only":
        obey_permissions()
    elif fault == "clock jump":
        now = time.time
        when = {at: lambda: setattr(time, "time", lambda: now() - 86400)}
    elif fault == "flipped bit" and last:
        flip_a_bit(at)
    elif fault == "other torch" and last:
        torch.__version__ = "2.0.0"
    data = Counting(config, ranks, when, bad, range(at, at + 3) if fault == "hole" else range(0))

    begin = Saver.start

    def faulty_start(saver: Saver, step: int, *rest: Any) -> None:
        if step != at:
            return begin(saver, step, *rest)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if fault == "disk full" and last:  # no file can grow beyond 4 KiB
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        if fault == "kill while writing":
            manifest.measure = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        if fault == "kill before renaming":
            Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
        try:
            begin(saver, step, *rest)
            while fault == "disk full" and not saver.written:
                time.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    Saver.start = faulty_start  # type: ignore[assignment, method-assign]
    inputs = Inputs(Objective(), data, HeldOut(data), 4.0, 4.0, {"generated": "1"}, None)  # type: ignore[arg-type]
    loop.open_inputs = lambda *_: inputs  # type: ignore[assignment]
    end = loop.run(config, run_dir, resume, ranks)
    print(end.message)
    sys.exit(end.exit_code)
