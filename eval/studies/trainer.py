"""Trains one small model on one task: AdamW in fp32, linear warm-up, cosine decay, early stop."""

import time

import torch

from riverrun.eval.studies.curriculum import train_curriculum
from riverrun.eval.studies.fit import Progress, exact_solver, on, optimiser, predictor
from riverrun.eval.studies.memory import MemoryTask
from riverrun.eval.studies.run import Result, Run
from riverrun.eval.studies.scoring import evaluate
from riverrun.eval.studies.task import TEST, VALIDATION, SequenceTask


def train(run: Run, device: torch.device, progress: Progress = lambda step, words: None) -> Result:
    """Train and test one model. Deterministic on one machine, for one number of threads.

    Raises:
        ValueError: a run that is impossible; says why.
    """
    run.check()
    task = run.make_task()
    with exact_solver():
        if isinstance(task, SequenceTask):
            return _train_sequences(run, task, device, progress)
        assert isinstance(task, MemoryTask)
        return train_curriculum(run, task, device, progress)


def _train_sequences(run: Run, task: SequenceTask, device: torch.device, progress: Progress) -> Result:
    start = time.perf_counter()
    model = run.make_model(device)
    step_on = optimiser(run, model, decay=True)
    predict = predictor(model, device)
    losses: list[tuple[int, float]] = []
    perfect, step, score = 0, 0, 0.0
    while step < run.steps and not 0 < run.patience <= perfect:
        inputs, targets = task.training_batch(run.seed, step, run.batch_size, run.train_length)
        loss = model(on(device, inputs), targets=on(device, targets), **_row_keys(run, step, device)).loss
        step_on(loss, step)
        step += 1
        if step % run.validate_every == 0 or step == run.steps:
            losses.append((step, loss.item()))
            score = evaluate(task, predict, VALIDATION, run.held_out_rows, run.train_length).accuracy
            perfect = perfect + 1 if score == 1 else 0
            progress(step, f"loss {losses[-1][1]:.3f}, accuracy {score:.3f}")
    lengths = sorted({run.train_length, *run.test_lengths})
    by_length = [evaluate(task, predict, TEST, run.held_out_rows, length) for length in lengths]
    return Result(score, by_length, step, losses, time.perf_counter() - start)


def _row_keys(run: Run, step: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What the rows of a batch start at random places by, if the model is one that does so."""
    if run.universal is None:
        return {}
    first = run.seed << 40
    return {"row_keys": torch.arange(step * run.batch_size, (step + 1) * run.batch_size, device=device) + first}
