"""Small models of recurrent depth: one layer before the core, two in it, one after it."""

from dataclasses import replace

import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from tests.modeling.parallel.sharded import BASE, DEPTH

HUGINN = replace(
    BASE,
    num_hidden_layers=4,
    layer_pattern=("attention",),
    sandwich_norm=True,
    scale_embedding=True,
    attention=replace(BASE.attention, qk_bias=True),
    depth=DEPTH,
)
PARCAE = replace(HUGINN, sandwich_norm=False, scale_embedding=False, depth=replace(DEPTH, injection="diagonal"))


def around(options: ModelOptions, *core: str) -> ModelOptions:
    """With these mixers in the core, and attention before and after it."""
    return replace(options, layer_pattern=("attention", *core, "attention"), num_hidden_layers=2 + len(core))


SHAPES = {
    "attention": HUGINN,
    "attention, diagonal": PARCAE,
    "attention, window": replace(HUGINN, attention=replace(HUGINN.attention, window=5)),
    "gated_delta": around(HUGINN, "gated_delta", "gated_delta"),
    "gated_delta, diagonal": around(PARCAE, "gated_delta", "gated_delta"),
    "mamba2, para_lstm": around(HUGINN, "mamba2", "para_lstm"),
    "all core": replace(HUGINN, num_hidden_layers=2, depth=replace(DEPTH, prelude_layers=0, coda_layers=0)),
}
V = BASE.vocab_size


def build(shape: str | ModelOptions, dtype: torch.dtype = torch.float64, seed: int = 0) -> RiverrunForCausalLM:
    """In evaluation mode, with gains and biases that are not all alike."""
    torch.manual_seed(seed)
    model = RiverrunForCausalLM(RiverrunConfig.from_options(SHAPES[shape] if isinstance(shape, str) else shape))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.empty_like(p).uniform_(-0.3, 0.3))
    return model.to(dtype).eval()


def tokens(*size: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, V, size, generator=torch.Generator().manual_seed(seed))


def gradients(model: RiverrunForCausalLM) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-10) -> None:
    """Up to `rtol` of the largest expected value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()
