"""What all trainings share: AdamW in fp32 with warm-up, clipping at norm 1, and predictions in pieces."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from riverrun.eval.studies.run import Run
from riverrun.eval.studies.scoring import Predictor
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.train.config import ScheduleConfig
from riverrun.train.schedule import lr_factor

WARM_UP = 0.1  # of the steps
LOGITS = 1 << 25  # at a time in evaluation: 128 MiB

Progress = Callable[[int, str], None]  # the step, and how it goes


def on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def optimiser(run: Run, model: RiverrunForCausalLM, decay: bool) -> Callable[[torch.Tensor, int], None]:
    """What takes one optimiser step: (loss, step) ↦ parameters. Without `decay` the rate stays after its warm-up."""
    weight_decay = run.make_task().defaults.weight_decay
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=run.learning_rate)
    warm_up = int(WARM_UP * run.steps)
    schedule = ScheduleConfig(warmup_steps=warm_up, min_lr_ratio=0.0 if decay else 1.0)

    def step_on(loss: torch.Tensor, step: int) -> None:
        for group in adamw.param_groups:
            group["lr"] = run.learning_rate * lr_factor(schedule, step, run.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return step_on


def predictor(model: RiverrunForCausalLM, device: torch.device) -> Predictor:
    """The model's most likely token at each position."""

    @torch.no_grad()
    def predict(inputs: np.ndarray) -> np.ndarray:
        at_once = max(1, LOGITS // (inputs.shape[1] * model.config.vocab_size))
        rows, training = on(device, inputs).split(at_once), model.training
        model.eval()
        predicted = np.concatenate([model(part).logits.argmax(-1).cpu().numpy() for part in rows])
        model.train(training)
        return predicted

    return predict


@contextmanager
def exact_solver() -> Iterator[None]:
    """Without the warnings of ParaGRU and ParaLSTM that a solve was redone sequentially: it is exact then, only slower,
    and with large recurrent weights it is the rule."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*shooting did not converge")
        yield
