"""What nonlinear recurrences are for: one layer learns parity on short sequences and keeps it on long ones."""

import warnings

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.mixers import OPTIONS
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions


def one_layer(mixer: str) -> RiverrunForCausalLM:
    """Without the convolution, which would count a few tokens by itself, and with recurrent weights that may leave the
    contractive range: parity needs two stable states."""
    settings = OPTIONS[mixer](num_heads=1, conv_kernel=1, max_recurrent_weight=4.0)
    options = ModelOptions(
        vocab_size=2,
        hidden_size=32,
        num_hidden_layers=1,
        layer_pattern=(mixer,),
        intermediate_size=64,
        **{mixer: settings},
    )
    return RiverrunForCausalLM(RiverrunConfig.from_options(options))


def parity(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    bits = torch.randint(0, 2, (rows, length))
    return bits, bits.cumsum(1) % 2


@pytest.mark.parametrize("mixer", ["para_gru", "para_lstm"])
def test_parity_of_64_bits_holds_for_4096(mixer):
    model = one_layer(mixer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    length, steps = 4, 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f"{mixer}: shooting did not converge")
        while length <= 64 and steps < 1000:
            bits, targets = parity(32, length)
            loss = model(bits, targets=targets).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            if loss.item() < 0.05:
                length *= 2
        with torch.no_grad():
            bits, targets = parity(8, 4096)
            right = model(bits).logits.argmax(-1) == targets
    assert length > 64, f"not learnt in {steps} steps: length {length}, loss {loss.item():.3f}"
    assert right.float().mean() >= 0.99
