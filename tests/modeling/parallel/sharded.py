"""Whole models on ranks that share them, against one process; small shapes whose heads divide by four."""

from dataclasses import replace

import torch

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.modeling.memory_options import (
    AtlasOptions,
    MemoraOptions,
    TitansLMMOptions,
    TitansMACOptions,
    TitansMAGOptions,
    TitansMALOptions,
    YaadOptions,
)
from riverrun.modeling.mixer_options import (
    AttentionOptions,
    ElmanOptions,
    GatedDeltaOptions,
    GRUOptions,
    LSTMOptions,
    Mamba2Options,
    ParaGRUOptions,
    ParaLSTMOptions,
    PrefixLinearAttentionOptions,
    SLSTMOptions,
)
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import ALONE
from riverrun.modeling.parallel.sharding import build_sharded, parameter_plan
from tests.ranks import mesh as mesh_of

BASE = ModelOptions(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=24,
    initializer_range=0.3,  # large, so that every part matters for the loss
    attention=AttentionOptions(num_heads=4, num_kv_heads=2, head_dim=4),
    mamba2=Mamba2Options(head_dim=4, state_size=6, num_groups=2, chunk_size=4),
    gated_delta=GatedDeltaOptions(num_heads=4, head_dim=4, num_householder=2, chunk_size=8),
    para_gru=ParaGRUOptions(num_heads=4, tolerance=1e-12),
    para_lstm=ParaLSTMOptions(num_heads=4, tolerance=1e-12),
    slstm=SLSTMOptions(head_dim=4, recurrent_init=1.0),
    lstm=LSTMOptions(head_dim=4),
    gru=GRUOptions(head_dim=4),
    elman=ElmanOptions(head_dim=4),
    prefix_linear_attention=PrefixLinearAttentionOptions(
        num_heads=4, head_dim=4, feature_dim=3, encoder=False, chunk_size=4
    ),
)
MEMORY = {"num_heads": 4, "head_dim": 4, "expand": 2, "chunk_size": 4, "gate_rank": 3, "num_persistent": 3}
MEMORY |= {"half_life": 256.0}  # what is forgotten counts
BASE = replace(
    BASE,
    titans_lmm=TitansLMMOptions(**MEMORY),
    # without norms, which magnify rounding to more than training in fp32 is compared to
    titans_mag=TitansMAGOptions(**MEMORY, attention_window=5, norm=False),
    titans_mal=TitansMALOptions(**MEMORY, attention_window=5, norm=False),
    titans_mac=TitansMACOptions(**MEMORY, segment=4, norm=False),
    yaad=YaadOptions(**MEMORY),
    memora=MemoraOptions(**MEMORY),
    atlas=AtlasOptions(**MEMORY, omega_window=3),
)

DEPTH = DepthOptions(prelude_layers=1, coda_layers=1, mean_recurrence=5, backprop_depth=2)


def of(*pattern: str, **changes) -> ModelOptions:
    return replace(BASE, layer_pattern=pattern, num_hidden_layers=max(2, len(pattern)), **changes)


SHAPES = {
    "mamba2": of("mamba2"),
    "mamba2 one group, alone, tied": of(
        "mamba2", mamba2=replace(BASE.mamba2, num_groups=1), intermediate_size=0, tie_word_embeddings=True
    ),
    "gated_delta": of("gated_delta"),
    "para_gru": of("para_gru"),
    "para_lstm": of("para_lstm"),
    "slstm": of("slstm"),
    "lstm": of("lstm"),
    "gru, elman": of("gru", "elman"),
    "prefix_linear_attention": of("prefix_linear_attention"),
    "titans_lmm": of("titans_lmm"),
    "titans_lmm, no norm": of("titans_lmm", titans_lmm=replace(BASE.titans_lmm, norm=False)),
    "titans_lmm linear": of("titans_lmm", titans_lmm=replace(BASE.titans_lmm, depth=1, chunk_size=1)),
    "titans_lmm linear, no momentum": of(
        "titans_lmm", titans_lmm=replace(BASE.titans_lmm, depth=1, chunk_size=1, momentum=False, num_persistent=0)
    ),
    "titans": of("titans_mag", "titans_mal", "titans_mac"),
    "yaad": of("yaad"),
    "atlas": of("atlas"),
    "attention": of("attention"),
    "attention, one key head, full norms": of(
        "attention", post_norm_attention=True, attention=replace(BASE.attention, num_kv_heads=1, qk_norm="full")
    ),
    "attention, window, head norms": of(
        "attention", attention=replace(BASE.attention, num_kv_heads=4, qk_norm="head", window=5)
    ),
    "hybrid": of("mamba2", "para_lstm", "gated_delta", "attention"),
    "core of attention": of(
        *("attention",) * 4,
        sandwich_norm=True,
        scale_embedding=True,
        depth=DEPTH,
        attention=replace(BASE.attention, num_kv_heads=1, qk_bias=True),
    ),
    "core of gated_delta": of(
        "attention", "gated_delta", "gated_delta", "attention", depth=replace(DEPTH, injection="diagonal")
    ),
    "universal": of("attention", "mamba2", universal=UniversalOptions(max_steps=3, ponder_weight=0.1)),
}
Shape = str | ModelOptions
ROW_KEYS = torch.tensor([21, 22])  # what a core's initial states are drawn from


def config_of(shape: Shape) -> RiverrunConfig:
    return RiverrunConfig.from_options(SHAPES[shape] if isinstance(shape, str) else shape)


BOUNDS = [0, 3, 8, 9, 16, 32]  # of documents in two rows of 16 tokens
ROWS, LENGTH = 2, 16
Z_LOSS = 0.1


def batch():
    generator = torch.Generator().manual_seed(7)
    ids, targets = torch.randint(0, BASE.vocab_size, (2, ROWS, LENGTH), generator=generator).unbind()
    targets[0, 2] = targets[1, -1] = -100
    return ids, targets


def keys_of(model) -> dict[str, torch.Tensor]:
    return {} if model.config.options.depth is None else {"row_keys": ROW_KEYS}


def part(shape: Shape, cp: int, tp: int, recompute: bool, bounds: list[int], linear="auto", attention="auto", prefix=0):
    """On a rank: its part of the loss and its parameters' gradients."""
    mesh = mesh_of(cp, tp)
    torch.manual_seed(0)
    model = build_sharded(config_of(shape), mesh.tp).double().train()
    model.set_recompute(recompute)
    ids, targets = batch()
    if cp == 1:
        given = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}
    else:
        given = {"context": Context.of_rows(mesh.cp, ROWS, LENGTH, bounds, "cpu", linear, attention)}
        ids, targets = (x[:, mesh.cp.share(LENGTH)] for x in (ids, targets))
    given |= {"targets": targets, "num_targets": 10, "z_loss": Z_LOSS, "prefix": prefix, **keys_of(model)}
    out = model(ids, **given)
    out.loss.backward()
    with torch.no_grad():
        again = model.eval()(ids, **given)
    torch.testing.assert_close(again.loss, out.loss.detach())
    return out.loss.item(), out.cross_entropy.item(), {name: p.grad for name, p in model.named_parameters()}


def alone(shape: Shape, bounds: list[int], prefix: int):
    """The same on one process: the model with its gradients, loss and cross-entropy."""
    torch.manual_seed(0)
    model = build_sharded(config_of(shape), ALONE).double().train()
    ids, targets = batch()
    bounds = torch.tensor(bounds, dtype=torch.int32)
    given = {"targets": targets, "num_targets": 10, "z_loss": Z_LOSS, "prefix": prefix, **keys_of(model)}
    out = model(ids, cu_seqlens=bounds, **given)
    out.loss.backward()
    return model, out.loss.item(), out.cross_entropy.item()


def assert_parts_make_the_whole(results, shape: Shape, cp: int, tp: int, bounds: list[int], prefix: int = 0) -> None:
    model, loss, cross_entropy = alone(shape, bounds, prefix)
    assert abs(sum(r[0] for r in results) - loss) < 1e-10 * abs(loss)
    assert abs(sum(r[1] for r in results) - cross_entropy) < 1e-10 * cross_entropy
    plan = parameter_plan(model, tp)
    for name, param in model.named_parameters():
        of_tp = [sum(results[c * tp + t][2][name] for c in range(cp)) for t in range(tp)]
        if (split := plan[name]) is None:
            for other in of_tp[1:]:
                torch.testing.assert_close(other, of_tp[0])
        got = of_tp[0] if split is None else split.join(of_tp)
        scale = param.grad.abs().max()
        assert scale > 0 or bounds != BOUNDS, name  # with documents of one token, decays have no gradient
        assert (got - param.grad).abs().max() <= 1e-9 * scale + 1e-13, name
