"""Adaptive computation time against a loop over one position at a time."""

import pytest
import torch

from riverrun.modeling.depth.halting import Halting, Progress

POSITIONS, STEPS, DIM = 40, 5, 3


def draw(scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Halting logits (STEPS, POSITIONS), and the states after each step (STEPS, POSITIONS, DIM)."""
    generator = torch.Generator().manual_seed(3)
    logits = scale * torch.randn(STEPS, POSITIONS, generator=generator, dtype=torch.float64) - 0.5
    return logits, torch.randn(STEPS, POSITIONS, DIM, generator=generator, dtype=torch.float64)


def of_one(probabilities: list[torch.Tensor], states: torch.Tensor, epsilon: float):
    """What one position comes to, its N and its R: Graves's equations 5 to 8 in Python."""
    weights: list[torch.Tensor] = []
    for n, p in enumerate(probabilities, 1):
        total = sum(weights, torch.zeros((), dtype=torch.float64))
        if n == len(probabilities) or (total + p).item() > 1 - epsilon:
            weights.append(1 - total)
            return sum(w * s for w, s in zip(weights, states)), n, 1 - total, weights
        weights.append(p)


def together(p: torch.Tensor, states: torch.Tensor, epsilon: float):
    """The same of all positions at once, and every step's weights (steps, POSITIONS)."""
    progress, out, weights = Progress.start(p[0]), torch.zeros_like(states[0]), []
    for t in range(len(p)):
        weight, progress = progress.step(p[t], epsilon, last=t == len(p) - 1)
        weights.append(weight)
        out = out + weight[:, None] * states[t]
    return out, progress, torch.stack(weights)


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_positions_halt_as_each_alone(epsilon, steps):
    logits, states = draw()
    logits, states = logits[:steps].requires_grad_(), states[:steps].requires_grad_()
    out, progress, weights = together(logits.sigmoid(), states, epsilon)
    assert not progress.running.any()
    torch.testing.assert_close(weights.sum(0), torch.ones(POSITIONS, dtype=torch.float64), rtol=1e-14, atol=0)
    p = logits.sigmoid()
    alone = [of_one(list(p[:, i]), states[:, i], epsilon) for i in range(POSITIONS)]
    torch.testing.assert_close(out, torch.stack([a[0] for a in alone]))
    assert progress.steps.tolist() == [a[1] for a in alone]
    torch.testing.assert_close(progress.remainder, torch.stack([a[2] for a in alone]))
    for i, (*_, n) in enumerate(alone):
        assert weights[len(n) :, i].count_nonzero() == 0, "a halted position has no weight"

    upstream = torch.randn(out.shape, dtype=torch.float64)
    got = torch.autograd.grad((out * upstream).sum() + progress.cost.sum(), (logits, states), allow_unused=True)
    loop = sum((a[0] * u).sum() + a[1] + a[2] for a, u in zip(alone, upstream))
    expected = torch.autograd.grad(loop, (logits, states), allow_unused=True)
    for g, e in zip(got, expected):
        torch.testing.assert_close(torch.zeros(()) if g is None else g, torch.zeros_like(g) if e is None else e)


def test_draws_halt_at_every_step():
    """Otherwise the tests above would say little."""
    logits, states = draw()
    _, progress, _ = together(logits.sigmoid(), states, 0.01)
    assert set(progress.steps.tolist()) == set(range(1, STEPS + 1))


def test_gradients_by_differences():
    logits, states = draw(0.5)
    logits, states = logits[:, :6].requires_grad_(), states[:, :6].requires_grad_()

    def function(logits, states):
        out, progress, _ = together(logits.sigmoid(), states, 0.01)
        return out, progress.cost

    torch.autograd.gradcheck(function, (logits, states))


def test_the_threshold_itself_is_not_beyond():
    """Π + p = 1 − ε goes on, anything above halts."""
    progress = Progress.start(torch.zeros(2, dtype=torch.float64))
    weight, progress = progress.step(torch.tensor([0.75, 0.7500001], dtype=torch.float64), 0.25, last=False)
    assert weight.tolist() == [0.75, 1.0] and progress.running.tolist() == [True, False]
    weight, progress = progress.step(torch.tensor([0.9, 0.9], dtype=torch.float64), 0.25, last=False)
    assert weight.tolist() == [0.25, 0.0] and progress.remainder.tolist() == [0.25, 1.0]
    assert progress.cost.tolist() == [2.25, 2.0]


def test_one_step_has_all_the_weight():
    weight, progress = Progress.start(torch.zeros(3)).step(torch.tensor([0.0, 0.5, 1.0]), 0.01, last=True)
    assert weight.tolist() == [1.0] * 3 and progress.cost.tolist() == [2.0] * 3


def test_probabilities_start_near_that_of_the_bias_and_are_in_fp32():
    halting = Halting(16, 0.02)
    halting.reset_parameters()
    x = torch.randn(2, 3, 16)
    p = halting(x)
    torch.testing.assert_close(p, torch.sigmoid(x @ halting.weight + 1))
    assert (p - torch.sigmoid(torch.ones(()))).abs().max() < 0.1 and p.std() > 0
    assert halting.bfloat16()(x.bfloat16()).dtype == torch.float32
    assert halting.double()(x.double()).dtype == torch.float64
