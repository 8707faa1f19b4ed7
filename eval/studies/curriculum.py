"""The curricula of N-parity and N-DMS (arXiv 2309.12927): N grows whenever it is learnt.

Departures from the paper: AdamW in place of SGD, and held-out accuracy after `validate_every` steps in place of epochs
of 600. The rate stays constant after its warm-up: when the last N comes is not known before.
"""

import time
from statistics import mean

import torch
from torch.nn import functional as F

from riverrun.eval.studies.fit import Progress, on, optimiser
from riverrun.eval.studies.memory import FIRST, MemoryTask
from riverrun.eval.studies.run import Result, Run
from riverrun.eval.studies.scoring import Accuracy, accuracy
from riverrun.eval.studies.task import TEST, TRAIN, VALIDATION
from riverrun.modeling.model import RiverrunForCausalLM


def train_curriculum(run: Run, task: MemoryTask, device: torch.device, progress: Progress) -> Result:
    """Train from N = 2 until N = train_length is learnt, or the steps are used up.

    The accuracies are those of the final model at each N, by the head for that N. The "single" curriculum has one head
    for all: its accuracy at smaller N shows what it has forgotten.
    """
    start = time.perf_counter()
    model = run.make_model(device)
    step_on = optimiser(run, model, decay=False)
    losses: list[tuple[int, float]] = []
    newest, passed, step = FIRST, 0, 0
    while step < run.steps and newest <= run.train_length:
        ns = task.trained(newest)
        inputs, targets = task.batch(TRAIN, run.seed, step, run.batch_size, ns)
        logits = head_logits(model, task, on(device, inputs), ns)
        loss = F.cross_entropy(logits.flatten(0, 1), on(device, targets).flatten(), reduction="sum") / len(inputs)
        step_on(loss, step)
        step += 1
        if step % run.validate_every == 0:
            losses.append((step, loss.item()))
            found = measure(model, task, device, VALIDATION, step, run.held_out_rows, ns)
            progress(step, f"N {newest}, accuracy {found[-1].accuracy:.3f}")
            if min(mean(each.accuracy for each in found), found[-1].accuracy) > task.advance_above:
                passed, newest = newest, newest + 1
    score = float(passed)
    if newest <= run.train_length:
        (next_one,) = measure(model, task, device, VALIDATION, 0, run.held_out_rows, range(newest, newest + 1))
        score += min(0.99, next_one.accuracy)
    lengths = sorted({run.train_length, *run.test_lengths})
    by_length = [measure(model, task, device, TEST, 0, run.held_out_rows, range(n, n + 1))[0] for n in lengths]
    return Result(score, by_length, step, losses, time.perf_counter() - start)


def head_logits(model: RiverrunForCausalLM, task: MemoryTask, inputs: torch.Tensor, ns: range) -> torch.Tensor:
    """(R, len(ns), 2): both logits of each N's head after the last bit."""
    logits = model(inputs, logits_to_keep=1).logits[:, 0].unflatten(1, (-1, 2))
    return logits[:, [task.head(n) for n in ns]]


@torch.no_grad()
def measure(
    model: RiverrunForCausalLM, task: MemoryTask, device: torch.device, stream: int, index: int, rows: int, ns: range
) -> list[Accuracy]:
    """The accuracy of each N's head on the same rows."""
    inputs, targets = task.batch(stream, 0, index, rows, ns)
    predicted = head_logits(model, task, on(device, inputs), ns).argmax(-1).cpu().numpy()
    return [accuracy(predicted[:, i : i + 1], targets[:, i : i + 1], n) for i, n in enumerate(ns)]
