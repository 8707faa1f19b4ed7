"""A small language model trains alike through the Triton kernel and through the step loop."""

import functools
import statistics
from pathlib import Path

import torch

from riverrun.kernels.para_gru import para_gru
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.mixer_options import ParaGRUOptions
from riverrun.modeling.mixers import para
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions

STEPS, WINDOW = 1000, 100


def train(monkeypatch, backend: str, seed: int) -> list[float]:
    """The loss of every step on the bytes of Python's own library."""
    monkeypatch.setattr(para, "para_gru", functools.partial(para_gru, backend=backend))
    text = b"".join(path.read_bytes() for path in sorted(Path(statistics.__file__).parent.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).cuda()
    torch.manual_seed(seed)
    options = ModelOptions(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        layer_pattern=("para_gru",),
        intermediate_size=128,
        para_gru=ParaGRUOptions(num_heads=2),
    )
    model = RiverrunForCausalLM(RiverrunConfig.from_options(options)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(data) - 65, (16, 1)).cuda()
        rows = data[starts + torch.arange(65, device="cuda")].long()
        loss = model(rows[:, :-1], targets=rows[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def test_a_thousand_steps(monkeypatch):
    reference, triton, other_seed = (
        [statistics.mean(curve[i : i + WINDOW]) for i in range(0, STEPS, WINDOW)]
        for curve in (train(monkeypatch, *run) for run in (("reference", 0), ("triton", 0), ("triton", 1)))
    )
    noise = max(abs(a - b) for a, b in zip(triton, other_seed))
    difference = max(abs(a - b) for a, b in zip(triton, reference))
    print(f"last loss {reference[-1]:.4f} and {triton[-1]:.4f}; difference {difference:.5f}, of two seeds {noise:.5f}")
    assert reference[-1] < reference[0] - 1
    assert difference <= noise
