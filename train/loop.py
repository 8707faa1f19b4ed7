"""The training loop: one optimiser step after another, with records, evaluations and checkpoints in between."""

import json
import math
import platform
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from riverrun import __version__
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.parallel.mesh import ALONE, Axis
from riverrun.modeling.parallel.sharding import build_sharded, meta_model, parameter_plan
from riverrun.train import checkpoint, initial, metrics, plot, universal
from riverrun.train import engine as engines
from riverrun.train.config import Recipe
from riverrun.train.distributed import Ranks
from riverrun.train.guard import Diverged, Guard
from riverrun.train.inputs import Inputs, open_inputs
from riverrun.train.interrupt import Interrupt
from riverrun.train.profile import Profiler
from riverrun.train.progress import Display
from riverrun.train.recipe import to_toml
from riverrun.train.resume import Start, check_space, find_start
from riverrun.train.schedule import lr_factor
from riverrun.train.state_passing import FOLDER


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        signal: the number of the signal that stopped it early, or 0.
        saved: whether the checkpoint of `step` is on disk.
        message: for the user.
    """

    step: int
    signal: int
    saved: bool
    message: str

    @property
    def exit_code(self) -> int:
        if not self.saved:
            return 1
        return 128 + self.signal if self.signal else 0


def run(recipe: Recipe, run_dir: Path, resume: str, ranks: Ranks) -> Outcome:
    """Trains `recipe` in `run_dir`. Called on every rank alike, within a process group.

    The folder then holds config.toml, config.json (the model's), tokenizer/, versions.json, metrics.jsonl,
    tensorboard/, checkpoints/ and loss.png.

    Args:
        recipe: resolved and without problems.
        resume: see `resume.find_start`.

    Raises:
        ValueError: whatever the user has to mend: ranks, data, folders, a diverging run.
    """
    accumulation = micro_batches(recipe, ranks.mesh.dp.size)
    with Interrupt() as interrupt:
        start = ranks.first(lambda: find_start(run_dir, resume, recipe, _warn))
        inputs = open_inputs(recipe, ranks, start.state["stores"] if start.state else None)
        weights = None
        if (source := recipe.train.init_from) is not None and start.checkpoint is None:
            weights = initial.read(ranks.first(lambda: initial.locate(source)), recipe.model)
        model = build_model(recipe, ranks.mesh.tp, weights)
        trainer = Trainer(recipe, run_dir, ranks, model, inputs, start, accumulation, interrupt)
        try:
            return trainer.train()
        finally:
            trainer.close()


def micro_batches(recipe: Recipe, dp_size: int) -> int:
    """The micro batches that each of `dp_size` data-parallel ranks computes a step.

    Raises:
        ValueError: the global batch does not divide.
    """
    rows, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    if recipe.engine.zero_stage == 3 and recipe.train.eval_rows < dp_size:
        raise ValueError(
            f"train.eval_rows={recipe.train.eval_rows} is less than the {dp_size} data-parallel ranks, each of which "
            f"has to evaluate a row under engine.zero_stage=3: set train.eval_rows={dp_size} or more"
        )
    if rows % (micro * dp_size) == 0:
        return rows // (micro * dp_size)
    fitting = [m for m in range(1, rows // dp_size + 1) if rows % (m * dp_size) == 0]
    fix = (
        f"set train.micro_batch_size to one of {', '.join(map(str, fitting))}"
        if fitting
        else f"set train.global_batch_size to a multiple of {dp_size}"
    )
    raise ValueError(
        f"train.global_batch_size={rows} does not divide into micro batches of train.micro_batch_size={micro} on "
        f"{dp_size} data-parallel ranks: {fix}"
    )


def build_model(
    recipe: Recipe, tp: Axis = ALONE, weights: Mapping[str, torch.Tensor] | None = None
) -> RiverrunForCausalLM:
    """Seeds the random number generators, then builds this rank's part of the model, in fp32 on the CPU, with its
    initial weights: its part of those given, or else the same for a seed on any number of ranks and every device."""
    random.seed(recipe.train.seed)
    np.random.seed(recipe.train.seed)  # noqa: NPY002 - libraries still draw from the global generator
    torch.manual_seed(recipe.train.seed)
    model = build_sharded(RiverrunConfig.from_options(recipe.model), tp)
    if weights is not None:
        initial.adopt(model, weights, tp)
    model.train()
    model.set_recompute(recipe.train.recompute)
    if recipe.train.compile:
        model.compile_blocks()
    return model


class Trainer:
    """One rank's part of a run. What outlives a crash is written by `_save`; all else follows from the recipe."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        ranks: Ranks,
        model: RiverrunForCausalLM,
        inputs: Inputs,
        start: Start,
        accumulation: int,
        interrupt: Interrupt,
    ):
        self.recipe, self.run_dir, self.ranks, self.inputs, self.interrupt = recipe, run_dir, ranks, inputs, interrupt
        self.step = start.step
        self.saved_step = start.step if start.checkpoint else -1
        self.save_failed = False
        self.guard, self.window = Guard(), metrics.Window()
        whole = meta_model(RiverrunConfig.from_options(recipe.model))
        parameters = sum(p.numel() for p in whole.parameters())
        self.flops_per_token = 3 * whole.flops_per_token(recipe.data.seq_len)
        self.peak_flops = metrics.peak_flops(recipe.log, ranks.device, recipe.train.dtype)
        self.first = ranks.rank == 0
        self.display = Display(False, 0, 0)

        plan = parameter_plan(whole, ranks.mesh.tp.size)
        shapes = {name: p.shape for name, p in whole.named_parameters()}
        model.universal_checkpoint_info = universal.description(plan, shapes, ranks.mesh.tp.size)  # type: ignore[assignment]
        self.engine = engines.Engine(
            model, recipe.optimizer, recipe.train, recipe.engine, ranks, accumulation, recipe.parallel, inputs.objective
        )
        same, stateless = True, False
        if start.checkpoint is not None:
            same = checkpoint.restore(start.checkpoint, self.engine, recipe, ranks)
            states = self.engine.states
            stateless = states is not None and not states.restore(start.checkpoint / FOLDER)
            assert self.engine.global_steps == start.step
            assert start.state is not None
            self.guard.restore(start.state["guard"])
            self.window = metrics.Window(**start.state["window"])

        self.file: metrics.MetricsFile | None = None
        self.dashboards: metrics.Dashboards | None = None
        if self.first:
            _write_description(run_dir, recipe, model, inputs, ranks)
            superseded = checkpoint.set_aside(run_dir, self.step) if checkpoint.folder_of(run_dir).is_dir() else []
            self.dashboards = metrics.Dashboards(recipe.log, run_dir, recipe.model_dump(mode="json"), self.step)
            self.file = metrics.MetricsFile(run_dir / "metrics.jsonl", self.step)
            self.display = Display(True, recipe.train.steps, self.step)
            begin = f"from the weights of {recipe.train.init_from}" if recipe.train.init_from else "from the beginning"
            where = f"from step {self.step} ({start.checkpoint})" if start.checkpoint else begin
            where += "" if same else ", resharded for this layout"
            where += ", which has no recurrent states: rows start from zeros once" if stateless else ""
            self.display.say(
                f"{recipe.name}: {parameters / 1e6:,.1f}M parameters, {recipe.train.dtype}, "
                f"ZeRO-{recipe.engine.zero_stage} on {ranks.world_size} x {ranks.device.type} "
                f"({ranks.mesh.describe()}), {where}; run folder {run_dir}"
            )
            for path in superseded:
                self.display.say(f"later checkpoint moved to {path}", style="yellow")
            if warning := check_space(run_dir, 14 * parameters):
                self.display.say(f"warning: {warning}", style="yellow")

    def train(self) -> Outcome:
        """Runs to the last step, or to a signal."""
        recipe, stopped, begun = self.recipe, 0, self.step
        profiler = Profiler(self.run_dir, self.ranks.rank) if recipe.profile else None
        self.clock = Clock()
        if self.step == 0 and recipe.train.eval_every:
            self._evaluate()  # the untrained model, for the curve
        with Prefetcher(self.inputs.train.step, self.step, recipe.train.steps) as batches:
            while self.step < recipe.train.steps and not stopped:
                stopped = self._step(batches.next())
                if profiler is not None:
                    profiler.step()
                self.display.step(self.step)
                if self._due(recipe.train.log_every):
                    self._record()
                if recipe.train.eval_every and self._due(recipe.train.eval_every):
                    self._evaluate()
                if recipe.checkpoint.every and self._due(recipe.checkpoint.every):
                    self._save()
        if profiler is not None:
            profiler.close()
        if self.step > begun and not stopped and not recipe.train.eval_every:
            self._evaluate()
        if self.saved_step != self.step:
            self._save()
        if self.first:
            plot.loss_curve(list(metrics.read(self.run_dir / "metrics.jsonl")), self.run_dir / "loss.png", recipe.name)
        return self._outcome(stopped)

    def close(self) -> None:
        self.display.close()
        for open_file in (self.file, self.dashboards):
            if open_file is not None:
                open_file.close()

    def _step(self, batches: list[Any]) -> int:
        """One optimiser step. Returns the signal that any rank received, or 0."""
        factor = lr_factor(self.recipe.schedule, self.step, self.recipe.train.steps)
        objective, leads = self.inputs.objective, self.ranks.mesh.leads
        summed = self.engine.accumulate(batches)
        counts = [sum(part) if leads else 0 for part in zip(*map(objective.counts, batches))]
        received = self.interrupt.signal
        totals = self.ranks.total(*summed.tolist(), *counts, received == signal.SIGINT, received == signal.SIGTERM)
        losses = dict(zip(objective.names, zip(totals, totals[len(counts) :])))
        signals = totals[-2:]
        update = self.engine.step(factor)
        self.step += 1
        assert self.engine.global_steps == self.step
        self.window.add(losses, update.skipped)
        self.last_update, self.last_factor = update, factor
        self.clock.count(self.recipe.train.global_batch_size * self.recipe.data.seq_len)
        try:
            self.guard.observe(update.skipped)
        except Diverged as error:
            raise Diverged(f"{error}; {self._last_saved()}") from None
        return next((int(number) for number, count in zip((signal.SIGINT, signal.SIGTERM), signals) if count), 0)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.recipe.train.steps

    def _record(self) -> None:
        self.window.add_solves()
        losses, window = self.window.means(), self.window
        self.window = metrics.Window()
        # every rank has the same layers, so that all of them take part or none does
        solves = metrics.merge_solves(*self.ranks.gather(window.solves)) if window.solves else {}
        if not self.first:
            return
        speed = self.clock.tokens_per_second()
        device_speed = speed / self.ranks.world_size
        update, loss = self.last_update, losses.pop("loss", None)
        self._write(
            {
                "kind": "train",
                "step": self.step,
                "tokens": self._tokens(),
                "loss": loss,
                "bits_per_byte": self._bits(loss, self.inputs.bytes_per_token),
                **losses,
                "lr": self.last_factor * self.recipe.optimizer.lr,
                "grad_norm": None if update.skipped else update.grad_norm,
                "tokens_per_second": speed,
                "mfu": device_speed * self.flops_per_token / self.peak_flops if self.peak_flops else None,
                "memory_gib": metrics.peak_memory_gib(self.ranks.device),
                "skipped": window.skipped,
                **metrics.solver_metrics(solves),
            }
        )

    def _evaluate(self) -> None:
        """The loss on the first `eval_rows` rows of the held-out store: the same rows every time."""
        if self.inputs.held_out is None:
            return
        with self.clock.paused():
            summed = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
            targets = 0
            batches = list(self.inputs.held_out.batches())
            rounds = len(batches)
            if self.recipe.engine.zero_stage == 3:  # every forward is a collective: no rank may stop before the others
                rounds = max(self.ranks.gather(rounds))
            for index in range(rounds):
                value = self.engine.evaluate(batches[min(index, len(batches) - 1)])
                if index < len(batches):
                    summed += value
                    targets += batches[index].num_targets if self.ranks.mesh.leads else 0
            total, count = self.ranks.total(summed.item(), targets)
            if self.first and count:
                loss = total / count
                self._write(
                    {
                        "kind": "held_out",
                        "step": self.step,
                        "tokens": self._tokens(),
                        "loss": loss,
                        "perplexity": math.exp(min(loss, 700)),
                        "bits_per_byte": self._bits(loss, self.inputs.held_out_bytes_per_token),
                    }
                )

    def _save(self) -> None:
        """A checkpoint. If it cannot be written, training goes on: earlier checkpoints are untouched."""
        self.window.add_solves()
        with self.clock.paused():
            state = {
                "step": self.step,
                "layout": checkpoint.layout_of(self.recipe, self.ranks),
                "recipe": self.recipe.model_dump(mode="json"),
                "stores": self.inputs.fingerprints,
                "guard": self.guard.state(),
                "window": vars(self.window),
            }
            try:
                checkpoint.save(self.run_dir, self.step, self.recipe.checkpoint.keep, self.engine, state, self.ranks)
            except OSError as error:
                self.save_failed = True
                self.display.say(
                    f"WARNING: the checkpoint of step {self.step} could not be written: {error}\n"
                    f"Training goes on; {self._last_saved()}. Free some space.",
                    style="bold red",
                )
            else:
                self.save_failed, self.saved_step = False, self.step

    def _last_saved(self) -> str:
        if self.saved_step < 0:
            return "no checkpoint has been saved"
        return f"the last checkpoint is that of step {self.saved_step} in {checkpoint.folder_of(self.run_dir)}"

    def _outcome(self, stopped: int) -> Outcome:
        saved = self.saved_step == self.step
        if not saved:
            message = f"stopped at step {self.step}, but its checkpoint could not be saved: {self._last_saved()}"
        elif stopped:
            message = (
                f"interrupted after step {self.step} of {self.recipe.train.steps}, which is saved: the same command "
                "with --resume auto goes on from there"
            )
        else:
            message = f"finished {self.step} steps; run folder {self.run_dir}"
        return Outcome(self.step, stopped, saved, message)

    def _tokens(self) -> int:
        return self.step * self.recipe.train.global_batch_size * self.recipe.data.seq_len

    def _bits(self, loss: float | None, bytes_per_token: float | None) -> float | None:
        return metrics.bits_per_byte(loss, bytes_per_token) if loss is not None and bytes_per_token else None

    def _write(self, record: dict[str, Any]) -> None:
        assert self.file is not None and self.dashboards is not None
        self.file.write(record)
        self.dashboards.write(record)
        self.display.record(record)


class Clock:
    """Tokens a second since the last reading, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._tokens, self._start, self._lost = 0, time.perf_counter(), 0.0
        self._pause = 0.0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        now = time.perf_counter()
        speed = self._tokens / max(now - self._start - self._lost, 1e-9)
        self._tokens, self._start, self._lost = 0, now, 0.0
        return speed

    def paused(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self._pause = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._lost += time.perf_counter() - self._pause


class Prefetcher:
    """Calls `make(step)` for the next step in another thread while the current one is computed."""

    def __init__(self, make: Callable[[int], list[Any]], step: int, stop: int):
        self._make, self._next_step, self._stop = make, step, stop
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._future = self._submit()

    def next(self) -> list[Any]:
        assert self._future is not None
        batches = self._future.result()
        self._next_step += 1
        self._future = self._submit()
        return batches

    def _submit(self):
        return self._pool.submit(self._make, self._next_step) if self._next_step < self._stop else None

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _write_description(run_dir: Path, recipe: Recipe, model: RiverrunForCausalLM, inputs: Inputs, ranks: Ranks) -> None:
    """What an export or another reader needs besides the weights."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.toml").write_text(to_toml(recipe), encoding="utf-8")
    model.config.save_pretrained(run_dir)
    if inputs.tokenizer is not None:
        inputs.tokenizer.save(run_dir / "tokenizer")
    import transformers

    found = {
        "riverrun": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        **engines.versions(),
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.machine(),
        "ranks": f"{ranks.world_size} ({ranks.mesh.describe()})",
    }
    (run_dir / "versions.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
