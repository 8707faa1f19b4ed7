"""Huginn-0125's forward pass in plain torch, from its description (Geiping et al. 2025, arXiv 2502.05171) alone, with
nothing of Riverrun in it; a published config in small, and random weights by the published names.
"""

import math
from typing import Any

import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]


def config(**changes: Any) -> dict[str, Any]:
    """A config.json with the fields of the published one, derived ones among them."""
    values: dict[str, Any] = {
        "model_type": "huginn_raven",
        "architectures": ["RavenForCausalLM"],
        "auto_map": {
            "AutoConfig": "raven_config_minimal.RavenConfig",
            "AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM",
        },
        "n_embd": 24,
        "n_heads": 3,
        "n_layers": 4,
        "block_size": 32,
        "vocab_size": 40,
        "padding_multiple": 8,
        "tie_embeddings": True,
        "intermediate_size": 20,
        "bias": False,
        "architecture_class_name": "RecurrentGPT",
        "block_class_name": "SandwichBlock",
        "norm_class_name": "RMSNorm_llama",
        "norm_eps": 1e-6,
        "mlp_class_name": "GatedMLP",
        "nonlin_name": "SiLU",
        "init_strategy": "takase",
        "init_orthogonal": False,
        "state_init": "like-init",
        "injection_type": "linear",
        "n_layers_in_recurrent_block": 2,
        "mean_recurrence": 5,
        "sampling_scheme": "poisson-lognormal-filling",
        "mean_backprop_depth": 3,
        "n_layers_in_prelude": 1,
        "n_layers_in_coda": 1,
        "qk_bias": True,
        "activation_checkpoint_impl": "per-iteration",
        "rope_base": 300,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.1",
        "test_time_noise": 0,
        "test_time_noise_type": "fixed",
    } | changes
    h, core = values["n_embd"], values["n_layers_in_recurrent_block"]
    depth = values["n_layers_in_prelude"] + values["n_layers_in_coda"] + core * values["mean_recurrence"]
    std = math.sqrt(2 / (5 * h))
    return values | {
        "padded_vocab_size": values["vocab_size"],
        "num_key_value_heads": values["n_heads"],
        "head_dim": h // values["n_heads"],
        "effective_expected_depth": depth,
        "init_values": {
            "std": std, "out_proj": std / math.sqrt(2 * depth), "embedding": std, "embed_scale": math.sqrt(h),
        },
    }  # fmt: skip


def blocks(config: dict[str, Any]) -> list[str]:
    parts = {"prelude": "n_layers_in_prelude", "core_block": "n_layers_in_recurrent_block", "coda": "n_layers_in_coda"}
    return [f"{part}.{i}" for part, number in parts.items() for i in range(config[number])]


def random_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """By the published names, in float32: large matrices, and gains and biases away from where they start."""
    h, inner, heads = config["n_embd"], config["intermediate_size"], config["n_heads"]
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config["vocab_size"], h), "adapter.weight": (h, 2 * h)}
    for block in blocks(config):
        shapes |= {f"{block}.norm_{i}.weight": (h,) for i in (1, 2, 3, 4)}
        shapes |= {f"{block}.attn.Wqkv.weight": (3 * h, h), f"{block}.attn.proj.weight": (h, h)}
        shapes |= {f"{block}.mlp.fc.weight": (2 * inner, h), f"{block}.mlp.proj.weight": (h, inner)}
        if config["qk_bias"]:
            shapes[f"{block}.attn.qk_bias"] = (2, 1, heads, h // heads)
    shapes["ln_f.weight"] = (h,)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[f"transformer.{name}"] = 1 + 0.3 * noise if len(shape) == 1 else noise / math.sqrt(shape[-1])
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if not config["tie_embeddings"]:
        weights["lm_head.weight"] = torch.randn(shapes["wte.weight"], generator=generator) / math.sqrt(h)
    weights["freqs_cis"] = rotary_table(config)
    return weights


def rotary_table(config: dict[str, Any]) -> torch.Tensor:
    """(1, block_size, 1, head_dim / 2, 2): cosine and sine of position · base^(−2i / head_dim), float32."""
    pairs = config["n_embd"] // config["n_heads"] // 2
    frequencies = torch.tensor([config["rope_base"] ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
    angles = torch.arange(config["block_size"], dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None].float()


def logits(weights: Weights, config: dict[str, Any], ids: torch.Tensor, state: torch.Tensor, steps: int):
    """ids (B, T) and s_0 (B, T, h) → (B, T, vocab_size) after `steps` iterations, in the dtype of the weights."""

    def prefixed(name: str) -> torch.Tensor:
        return weights[f"transformer.{name}.weight"]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + config["norm_eps"])
        return wide.to(x.dtype) * weight

    def attention(x: torch.Tensor, block: str) -> torch.Tensor:
        B, T, h = x.shape
        heads = config["n_heads"]
        q, k, v = (y.view(B, T, heads, h // heads) for y in (x @ prefixed(f"{block}.attn.Wqkv").mT).chunk(3, dim=-1))
        if config["qk_bias"]:
            bias_q, bias_k = weights[f"transformer.{block}.attn.qk_bias"]
            q, k = q + bias_q, k + bias_k
        q, k = turn(q), turn(k)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(h // heads)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        return y.reshape(B, T, h) @ prefixed(f"{block}.attn.proj").mT

    def turn(x: torch.Tensor) -> torch.Tensor:
        """Channels 2i and 2i + 1 as a complex number, times that of its angle."""
        angles = torch.view_as_complex(weights["freqs_cis"].to(x.dtype)[:, : x.shape[1]].contiguous())
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2)

    def mlp(x: torch.Tensor, block: str) -> torch.Tensor:
        gate, up = (x @ prefixed(f"{block}.mlp.fc").mT).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ prefixed(f"{block}.mlp.proj").mT

    def layer(x: torch.Tensor, block: str) -> torch.Tensor:
        n1, n2, n3, n4 = (prefixed(f"{block}.norm_{i}") for i in (1, 2, 3, 4))
        x = norm(x + attention(norm(x, n1), block), n2)
        return norm(x + mlp(norm(x, n3), block), n4)

    def stack(x: torch.Tensor, part: str) -> torch.Tensor:
        for block in blocks(config):
            x = layer(x, block) if block.startswith(f"{part}.") else x
        return x

    e = stack(math.sqrt(config["n_embd"]) * prefixed("wte")[ids], "prelude")
    for _ in range(steps):
        state = stack(torch.cat([state, e], dim=-1) @ prefixed("adapter").mT, "core_block")
    x = stack(norm(state, prefixed("ln_f")), "coda")
    return norm(x, prefixed("ln_f")) @ weights["lm_head.weight"].mT
