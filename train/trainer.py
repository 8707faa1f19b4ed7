"""One rank's part of a run: one optimiser step after another, with records, evaluations and checkpoints in between."""

import contextlib
import math
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.memory_statistics import noting
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan
from riverrun.train import checkpoint, held_out, metrics, outcome, plot, universal
from riverrun.train import engine as engines
from riverrun.train.clock import Clock
from riverrun.train.config import Recipe
from riverrun.train.data.gaps import Gap, place_of, with_gap
from riverrun.train.depth_monitor import LossByDepth, signature
from riverrun.train.description import write_description
from riverrun.train.distributed import Ranks
from riverrun.train.guard import Diverged, Guard, Verdict
from riverrun.train.inputs import Inputs
from riverrun.train.interrupt import SIGNALS, Interrupt, StopRequests
from riverrun.train.prefetch import Prefetcher
from riverrun.train.profile import Profiler
from riverrun.train.records import Records
from riverrun.train.replicas import Replicas
from riverrun.train.resume import Start, check_space
from riverrun.train.saver import Saver
from riverrun.train.schedule import lr_factor
from riverrun.train.state_passing import FOLDER
from riverrun.train.watchdog import Watchdog


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: optimiser steps done.
        stopped: what ended it early: the number of a signal, "requeue" or "stop" if it was asked to, or None.
        saved: whether the checkpoint of `step` is on disk.
        message: for the user.
    """

    step: int
    stopped: int | outcome.Reason | None
    saved: bool
    message: str

    @property
    def exit_code(self) -> int:
        if not self.saved:
            return outcome.FAILED
        if self.stopped is None:
            return outcome.FINISHED
        return 128 + self.stopped if isinstance(self.stopped, int) else outcome.STOPPED


class Trainer:
    """One rank's part of a run. What outlives a crash is written by `_save`; all else follows from the recipe.

    Args:
        recipe: with the micro batch of so many ranks.
        asked: the recipe that the user gave, and other numbers of ranks start from.
    """

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
        watchdog: Watchdog | None = None,
        job: str = "",
        asked: Recipe | None = None,
    ):
        self.recipe, self.run_dir, self.ranks, self.inputs, self.interrupt = recipe, run_dir, ranks, inputs, interrupt
        self.watchdog, self.job = watchdog, job
        self.first = ranks.rank == 0
        self.step = start.step
        self.saved_step = start.step if start.checkpoint else -1
        self.failed_step = -1  # of the last checkpoint that could not be written
        self.guard, self.window = Guard(recipe.guard), metrics.Window()
        self.gaps: list[Gap] = []
        self.saver = Saver(run_dir, recipe.checkpoint.keep, ranks, recipe.checkpoint.asynchronous)
        self.records = Records(recipe, run_dir, self.first)
        self.stops = StopRequests(run_dir if self.first else None)
        whole = meta_model(RiverrunConfig.from_options(recipe.model))
        parameters = sum(p.numel() for p in whole.parameters())
        self.flops_per_token = partial(whole.training_flops_per_token, recipe.data.seq_len)
        self.loss_by_depth = LossByDepth(recipe.model.depth, ranks.mesh.leads)
        self.peak_flops = metrics.peak_flops(recipe.log, ranks.device, recipe.train.dtype)

        plan = parameter_plan(whole, ranks.mesh.tp.size)
        shapes = {name: p.shape for name, p in whole.named_parameters()}
        model.universal_checkpoint_info = universal.description(plan, shapes, ranks.mesh.tp.size)  # type: ignore[assignment]
        self.engine = engines.Engine(
            model, recipe.optimizer, recipe.train, recipe.engine, ranks, accumulation, recipe.parallel, inputs.objective
        )
        self.replicas = None
        if recipe.guard.replicas_every:
            self.replicas = Replicas(self.engine.module, ranks.mesh, recipe.engine.zero_stage)
        same, stateless = True, False
        if start.checkpoint is not None:
            assert start.state is not None
            same, stateless = self._restore(start.checkpoint, start.state)
        self.begun = self.step

        if self.first:
            write_description(run_dir, asked or recipe, model, inputs, ranks)
            superseded = checkpoint.set_aside(run_dir, self.step) if checkpoint.folder_of(run_dir).is_dir() else []
            self.records.open(self.step)
            begin = f"from the weights of {recipe.train.init_from}" if recipe.train.init_from else "from the beginning"
            where = f"from step {self.step} ({start.checkpoint})" if start.checkpoint else begin
            where += "" if same else ", resharded for this layout"
            where += ", which has no recurrent states: rows start from zeros once" if stateless else ""
            self.records.event(
                "start",
                self.step,
                f"{recipe.name}: {parameters / 1e6:,.1f}M parameters, {recipe.train.dtype}, "
                f"ZeRO-{recipe.engine.zero_stage} on {ranks.world_size} x {ranks.device.type} "
                f"({ranks.mesh.describe()}), {where}; run folder {run_dir}",
                style="none",
            )
            for path in superseded:
                self.records.display.say(f"later checkpoint moved to {path}", style="yellow")
            if warning := check_space(run_dir, 14 * parameters):
                self.records.display.say(f"warning: {warning}", style="yellow")
            self._stand("running")

    def train(self) -> Outcome:
        """Runs to the last step, or until it is stopped."""
        recipe, stopped = self.recipe, None
        profiler = Profiler(self.run_dir, self.ranks.rank) if recipe.profile else None
        self.clock = Clock()
        if self.step == 0 and recipe.train.eval_every:
            self._evaluate()  # the untrained model, for the curve
        while self.step < recipe.train.steps and stopped is None:
            with Prefetcher(self._batches, self.step, recipe.train.steps) as batches:
                while self.step < recipe.train.steps and stopped is None and not self.guard.gives_up:
                    self._phase("data")
                    stopped = self._step(batches.next())
                    if profiler is not None:
                        profiler.step()
                    self.records.display.step(self.step)
                    if self._due(recipe.train.log_every):
                        self._record()
                    if recipe.train.eval_every and self._due(recipe.train.eval_every):
                        self._evaluate()
                    if recipe.checkpoint.every and self._due(recipe.checkpoint.every) and not self.guard.gives_up:
                        self._save()
            if self.guard.gives_up:
                self._roll_back()
        if profiler is not None:
            profiler.close()
        if self.step > self.begun and stopped is None and not recipe.train.eval_every:
            self._evaluate()
        self._finish_save()
        if self.step not in (self.saved_step, self.failed_step):
            self._save()
            self._finish_save()
        if self.first:
            with contextlib.suppress(OSError):  # a full disk
                found = list(metrics.read(self.run_dir / "metrics.jsonl"))
                plot.loss_curve(found, self.run_dir / "loss.png", recipe.name)
        return self._outcome(stopped)

    def close(self) -> None:
        """Also after an error: then the checkpoint that is being written stays half-written."""
        self.saver.close()
        self.records.close()

    def _batches(self, step: int) -> list[Any]:
        """This rank's micro batches of a step. After a gap no row goes on from the states of the step before."""
        place = place_of(step, self.gaps)
        batches = self.inputs.train.step(place)
        if step and place != place_of(step - 1, self.gaps) + 1:
            batches = [b if b.carries is None else replace(b, carries=torch.zeros_like(b.carries)) for b in batches]
        return batches

    def _step(self, batches: list[Any]) -> int | outcome.Reason | None:
        """One optimiser step. Returns what any rank was asked to stop by."""
        self._phase("forward")
        factor = lr_factor(self.recipe.schedule, self.step, self.recipe.train.steps)
        objective, leads = self.inputs.objective, self.ranks.mesh.leads
        with noting(self._due(self.recipe.train.log_every, self.step + 1)):
            summed = self.engine.accumulate(batches, self.loss_by_depth)
        counts = [sum(part) if leads else 0 for part in zip(*map(objective.counts, batches))]
        flags = [self.interrupt.signal == number for number in SIGNALS]
        flags += [self.stops.asked() == reason for reason in outcome.REASONS]
        flags += [self.saver.written]
        drawn = signature(batches)
        sums = torch.cat([summed, self.ranks.on_device([float(v) for v in (*counts, *flags, drawn)])])
        torch.distributed.all_reduce(sums)  # which nobody waits for here: the gradient's norm is, in the engine's step
        verdict: Verdict | None = None
        loss: float | None = None

        def refuses(norm: float) -> bool:
            nonlocal verdict, loss
            loss = self._objective_loss(sums.tolist())
            verdict = self.guard.judge(loss, norm)
            return verdict is not None

        self._phase("step")
        update = self.engine.step(factor, refuses)
        self.step += 1
        assert self.engine.global_steps == self.step
        totals = sums.tolist()
        number = len(objective.names)
        if totals[-1] != drawn * self.ranks.world_size:
            raise ValueError(
                f"the ranks of step {self.step} drew unlike numbers of iterations: start them all with the same recipe"
            )
        self.window.add_iterations([b.num_steps for b in batches if b.num_steps is not None])
        self.window.add(dict(zip(objective.names, zip(totals[:number], totals[number:]))), update.skipped)
        self.last_update, self.last_factor = update, factor
        self.clock.count(self.recipe.train.global_batch_size * self.recipe.data.seq_len)
        self.guard.observe(loss, update.grad_norm, update.skipped)
        if update.skipped:
            why = verdict or self.guard.judge(self._objective_loss(totals), math.nan)
            self.records.event("skip", self.step, f"step {self.step} skipped: {why}", reason=str(why))
        if self.step == self.begun + 1:
            self.ranks.set_timeout(self.recipe.engine.collective_timeout_minutes)
        if self.replicas is not None and self.step % self.recipe.guard.replicas_every == 0:
            self._compare_replicas(self.replicas)
        asked = totals[2 * number : -1]
        if asked[-1] == self.ranks.world_size:
            self._finish_save()
        what = next((what for what, ranks in zip((*SIGNALS, *outcome.REASONS), asked) if ranks), None)
        return "requeue" if what == signal.SIGUSR1 else what

    def _compare_replicas(self, replicas: Replicas) -> None:
        """
        Raises:
            ValueError: some rank's weights are not what they should be. Nothing is saved of this.
        """
        if (wrong := replicas.check()) is not None:
            self.records.event("replicas differ", self.step, wrong)
            raise ValueError(
                f"at step {self.step} {wrong}. Take that host out, and go on without it; {self._last_saved()}"
            )

    def _objective_loss(self, totals: list[float]) -> float | None:
        """The step's objective, a weighted sum of means over predictions."""
        objective, number = self.inputs.objective, len(self.inputs.objective.names)
        parts = [(w, s, c) for w, s, c in zip(objective.weights, totals[:number], totals[number:]) if c]
        return sum(weight * value / count for weight, value, count in parts) if parts else None

    def _roll_back(self) -> None:
        """To the last good checkpoint, from which the run goes on without the data of the steps that were skipped.

        Raises:
            Diverged: it has gone back as often as it may, or there is nothing to go back to.
        """
        skipped = self.guard.in_a_row
        before, rollbacks = self.step - skipped, self.guard.rollbacks
        what = f"steps {before + 1} to {self.step} were skipped, {skipped} in a row (events.jsonl says why)"
        advice = (
            "Lower optimizer.lr, warm up longer (schedule.warmup_steps), train in train.dtype='fp32', or, if the data "
            "changed there for good, raise guard.sigma"
        )
        if rollbacks >= self.recipe.guard.rollbacks:
            often = f", and guard.rollbacks={rollbacks} are used up" if rollbacks else ""
            raise Diverged(f"{what}{often}. {advice}; {self._last_saved()}")
        self._finish_save()
        target = self.ranks.first(lambda: checkpoint.to_return_to(self.run_dir, before, self.records.display.say))
        if target is None and not self.guard.broken:
            self.guard.begin_anew()
            self.records.event(
                "guard",
                self.step,
                f"WARNING: {what}, and there is no checkpoint to go back to: training goes on, and takes such losses "
                f"and gradients for usual. {advice}",
            )
            return
        if target is None:
            raise Diverged(f"{what}, and there is no checkpoint to go back to. {advice}")
        self._phase("start")
        gaps = with_gap(self.gaps, place_of(before, self.gaps), place_of(self.step - 1, self.gaps) + 1)
        state = checkpoint.read_state(target)
        self.step = state["step"]
        self._restore(target, state)
        self.gaps, self.guard.rollbacks, self.guard.in_a_row = gaps, rollbacks + 1, 0
        self.saved_step = self.step
        if self.first:
            checkpoint.set_aside(self.run_dir, self.step)
            self.records.open(self.step)
        self.records.event(
            "rollback",
            self.step,
            f"{what}: back to step {self.step} ({target}), without their data",
            gaps=gaps,
        )
        self.ranks.barrier()

    def _restore(self, folder: Path, state: dict[str, Any]) -> tuple[bool, bool]:
        """Everything that a checkpoint holds. Returns whether the layout is the same, and whether it lacks recurrent
        states."""
        same = checkpoint.restore(folder, self.engine, self.recipe, self.ranks)
        states = self.engine.states
        stateless = states is not None and not states.restore(folder / FOLDER)
        assert self.engine.global_steps == state["step"]
        self.guard.restore(state["guard"])
        self.window = metrics.Window(**state["window"])
        self.gaps = [(start, end) for start, end in state.get("gaps", ())]
        return same, stateless

    def _due(self, every: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step % every == 0 or step == self.recipe.train.steps

    def _record(self) -> None:
        self._phase("record")
        self.window.add_solves()
        self.window.add_memories()
        losses, window = self.window.means(), self.window
        self.window = metrics.Window()
        # every rank has the same layers, so that all of them take part or none does
        solves = metrics.merge_solves(*self.ranks.gather(window.solves)) if window.solves else {}
        memories = metrics.merge_sums(*self.ranks.gather(window.memories)) if window.memories else {}
        if not self.first:
            return
        speed = self.clock.tokens_per_second()
        device_speed = speed / self.ranks.world_size
        update, loss = self.last_update, losses.pop("loss", None)
        flops = self.flops_per_token(window.mean_iterations)
        self.records.write(
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
                "mfu": device_speed * flops / self.peak_flops if self.peak_flops else None,
                "memory_gib": metrics.peak_memory_gib(self.ranks.device),
                "skipped": window.skipped,
                **metrics.solver_metrics(solves),
                **metrics.memory_metrics(memories),
                **metrics.depth_metrics(window),
            }
        )

    def _evaluate(self) -> None:
        """The loss on the first `eval_rows` rows of the held-out store, at other numbers of iterations too if asked."""
        if self.inputs.held_out is None:
            return
        with self.clock.paused():
            self._phase("evaluate")
            alive = partial(self._phase, "evaluate")
            found = held_out.measure(self.engine, self.recipe, self.inputs, self.ranks, alive)
            if not self.first or found is None:
                return
            self.records.write({"kind": "held_out", "step": self.step, "tokens": self._tokens(), **found})
            if self.saved_step >= 0 and math.isfinite(found["loss"]):
                with contextlib.suppress(OSError):  # a full disk: the one noted before stays good
                    checkpoint.mark_good(self.run_dir, self.saved_step)

    def _save(self) -> None:
        """Begins to write a checkpoint. If it cannot be, training goes on: earlier checkpoints are untouched."""
        self._finish_save()
        self.window.add_solves()
        self.window.add_memories()
        self._phase("save")
        with self.clock.paused():
            state = {
                "step": self.step,
                "layout": checkpoint.layout_of(self.recipe, self.ranks),
                "recipe": self.recipe.model_dump(mode="json"),
                "stores": self.inputs.fingerprints,
                "guard": self.guard.state(),
                "gaps": self.gaps,
                "window": vars(self.window),
            }
            try:
                self.saver.start(self.step, self.engine, state)
            except OSError as error:
                self._save_failed(self.step, error)
        if not self.recipe.checkpoint.asynchronous:
            self._finish_save()

    def _finish_save(self) -> None:
        """Waits for the checkpoint that is being written, if there is one, and puts it in its place."""
        if (step := self.saver.pending) is None:
            return
        self._phase("save")
        with self.clock.paused():
            try:
                saved = self.saver.finish()
            except OSError as error:
                self._save_failed(step, error)
                return
        assert saved is not None
        self.saved_step = saved.step
        self.records.event(
            "checkpoint",
            saved.step,
            stall_seconds=round(saved.stall, 3),
            write_seconds=round(saved.seconds, 3),
            bytes=saved.bytes,
        )
        if saved.undeleted is not None:
            what = f"WARNING: an older checkpoint could not be deleted: {saved.undeleted}. The next start tries again."
            self.records.event("checkpoint not deleted", saved.step, what, style="bold red")
        self._stand("running")

    def _save_failed(self, step: int, error: OSError) -> None:
        self.failed_step = step
        self.records.event(
            "checkpoint failed",
            step,
            f"WARNING: the checkpoint of step {step} could not be written: {error}\n"
            f"Training goes on; {self._last_saved()}. Free some space.",
            style="bold red",
        )

    def _last_saved(self) -> str:
        if self.saved_step < 0:
            return "no checkpoint has been saved"
        return f"the last checkpoint is that of step {self.saved_step} in {checkpoint.folder_of(self.run_dir)}"

    def _outcome(self, stopped: int | outcome.Reason | None) -> Outcome:
        saved = self.saved_step == self.step
        if not saved:
            message = f"stopped at step {self.step}, but its checkpoint could not be saved: {self._last_saved()}"
        elif stopped is not None:
            why = {"requeue": "stopped, to be started again,", "stop": "stopped as asked"}.get(
                str(stopped), "interrupted"
            )
            message = (
                f"{why} after step {self.step} of {self.recipe.train.steps}, which is saved: the same command "
                "with --resume auto goes on from there"
            )
        else:
            message = f"finished {self.step} steps; run folder {self.run_dir}"
        if stopped == "requeue" and self.first:
            outcome.request_stop(self.run_dir, stopped)  # if it came by a signal: so that whoever started it knows
        end = Outcome(self.step, stopped, saved, message)
        state: outcome.State = "failed" if not saved else "finished" if stopped is None else "stopped"
        if self.first:
            self._stand(state, end.exit_code, message)
            self.records.event(state, self.step)
        return end

    def _stand(self, state: outcome.State, exit_code: int = outcome.FAILED, message: str = "") -> None:
        if self.first:
            standing = outcome.Standing(
                state, self.step, self.recipe.train.steps, self.saved_step, exit_code, message, job=self.job
            )
            with contextlib.suppress(OSError):  # a full disk must not end the run
                outcome.write(self.run_dir, standing)

    def _phase(self, name: str) -> None:
        if self.watchdog is not None:
            # others wait for a rank that writes for as long as a collective may take
            allow = 60 * self.recipe.engine.collective_timeout_minutes if name == "save" else 0.0
            self.watchdog.phase(name, self.step, allow)

    def _tokens(self) -> int:
        return self.step * self.recipe.train.global_batch_size * self.recipe.data.seq_len

    def _bits(self, loss: float | None, bytes_per_token: float | None) -> float | None:
        return metrics.bits_per_byte(loss, bytes_per_token) if loss is not None and bytes_per_token else None
