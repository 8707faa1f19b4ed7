"""Models of all mixers on the GPU: equal to the CPU, decodes, compiles, and trains in bf16."""

import pytest
import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.memory_options import MEMORY_OPTIONS
from riverrun.modeling.mixer_options import (
    AttentionOptions,
    GatedDeltaOptions,
    Mamba2Options,
    PrefixLinearAttentionOptions,
)
from riverrun.modeling.mixers import OPTIONS
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions

MODELS = {
    "all but memories": tuple(name for name in OPTIONS if name not in MEMORY_OPTIONS),
    "Titans": ("titans_lmm", "titans_mag", "titans_mal", "titans_mac"),
    "Miras": ("moneta", "yaad", "memora"),
    "ATLAS": ("omeganet", "deep_transformer"),  # Atlas' own orthogonal updates magnify rounding
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> RiverrunForCausalLM:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=len(MODELS[name]),
        layer_pattern=MODELS[name],
        attention=AttentionOptions(num_heads=4, num_kv_heads=2),
        mamba2=Mamba2Options(head_dim=64, state_size=64),
        gated_delta=GatedDeltaOptions(num_heads=2, head_dim=64, num_householder=2),
        prefix_linear_attention=PrefixLinearAttentionOptions(encoder=False),
        **{name: options(num_heads=4, head_dim=64, chunk_size=16) for name, options in MEMORY_OPTIONS.items()},
    )
    return RiverrunForCausalLM(RiverrunConfig.from_options(options))


def batch(device):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 1000, (2, 256), generator=g)
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    cu_seqlens = torch.tensor([0, 7, 100, 256, 300, 512], dtype=torch.int32)
    return {"input_ids": ids.to(device), "targets": targets.to(device), "cu_seqlens": cu_seqlens.to(device)}


@every_model
def test_loss_and_gradients_equal_the_cpu(name):
    cpu, gpu = build(name), build(name).cuda()
    losses = [model(**batch(device)).loss for model, device in ((cpu, "cpu"), (gpu, "cuda"))]
    for loss in losses:
        loss.backward()
    assert torch.allclose(losses[0], losses[1].cpu(), rtol=1e-5)
    for (parameter, p), q in zip(cpu.named_parameters(), gpu.parameters()):
        error = (p.grad - q.grad.cpu()).norm() / p.grad.norm().clamp_min(1e-8)
        assert error < 1e-3, f"{parameter}: {error}"


@every_model
def test_decoding_equals_the_full_forward(name):
    model = build(name).cuda().eval()
    ids = batch("cuda")["input_ids"]
    with torch.no_grad():
        full = model(ids).logits
        out = model(ids[:, :200], use_cache=True)
        steps = [out.logits]
        for t in range(200, 210):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), full[:, :210], atol=1e-3)


@every_model
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_training_step_lowers_the_loss(name, compiled):
    model = build(name).cuda().bfloat16()
    model.set_recompute(True)
    if compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = model(**batch("cuda")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses
