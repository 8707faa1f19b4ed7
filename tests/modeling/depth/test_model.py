"""Models of recurrent depth: what they compute, and which gradients they have."""

import copy
import math
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.injection import DECAY
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.layout import Layout
from riverrun.modeling.model import RiverrunForCausalLM
from tests.modeling.depth.shapes import DEPTH, HUGINN, PARCAE, SHAPES, assert_close, build, gradients, tokens

every_shape = pytest.mark.parametrize("shape", SHAPES)
KEYS = torch.tensor([11, 12])


def inject(model, s, e):
    """The two papers' formulas, from the weights."""
    injection = model.model.core.injection
    if model.model.depth.injection == "linear":
        return torch.cat([s, e], dim=-1) @ injection.weight.T
    step = injection.dt_bias.exp().log1p()
    variance = e.square().mean(-1, keepdim=True)
    normed = e / (variance + injection.e_norm.eps).sqrt() * injection.e_norm.weight
    return torch.exp(step * -torch.exp(injection.A_log)) * s + (normed @ injection.B.T) * step


def hidden_by_hand(model, ids, n, k, keys):
    """All iterations in one graph, of which the first n get constants."""
    body, layout = model.model, Layout.of_rows(ids.shape, ids.new_zeros(len(ids)))
    x = body.embed_tokens(ids)
    if body.options.scale_embedding:
        x = x * math.sqrt(x.shape[-1])
    body.prepare_attention(layout, None, x.dtype)
    for block in body.prelude:
        x = block(x, layout)
    e, s = x, body.initial_state(x, layout, keys)
    for t in range(n + k):
        if t == n:
            s = s.detach()
        s = inject(model, s, e)
        for block in body.core.layers:
            s = block(s, layout)
    x = s if body.depth.injection == "linear" else s @ body.core.injection.C.T
    x = body.norm(x)
    for block in body.coda:
        x = block(x, layout)
    return body.norm(x)


def loss_by_hand(model, ids, n, k, keys):
    logits = hidden_by_hand(model, ids, n, k, keys) @ model.lm_head.weight.T
    return F.cross_entropy(logits.flatten(0, 1), ids.flip(1).flatten())


def loss_of(model, ids, steps, **options):
    return model(ids, targets=ids.flip(1), num_steps=steps, row_keys=KEYS, **options).loss


def assert_same_gradients(got, expected, rtol=1e-9):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        assert got[name] is not None and grad.abs().max() > 0, name
        assert (got[name] - grad).abs().max() <= rtol * grad.abs().max(), name


@every_shape
@pytest.mark.parametrize("steps", [(0, 1), (0, 2), (3, 2), (5, 1)], ids=str)
def test_loss_and_gradients_are_those_of_the_formulas(shape, steps):
    """With (0, 1) of a plain stack in which the adapter stands once; with n > 0 of a net whose first n states are
    constants."""
    model, ids = build(shape).train(), tokens(2, 9)
    loss = loss_of(model, ids, steps)
    loss.backward()
    got = gradients(model)
    model.zero_grad()
    expected = loss_by_hand(model, ids, *steps, KEYS)
    expected.backward()
    assert_close(loss.detach(), expected.detach())
    assert_same_gradients(got, gradients(model))


def test_a_plain_stack_with_the_same_blocks():
    """One iteration, of which the adapter passes on e: the layers in a row, and the norm between core and coda."""
    model = build(replace(HUGINN, depth=replace(DEPTH, norm_core=False)))
    plain = build(replace(HUGINN, depth=None))
    names = ["model.prelude.0", "model.core.layers.0", "model.core.layers.1", "model.coda.0"]
    weights = {}
    for name, p in model.state_dict().items():
        place = next((i for i, start in enumerate(names) if name.startswith(start)), None)
        if "injection" not in name:
            weights[name if place is None else f"model.layers.{place}{name.removeprefix(names[place])}"] = p
    plain.load_state_dict(weights)
    with torch.no_grad():
        h = HUGINN.hidden_size
        model.model.core.injection.weight.copy_(torch.cat([torch.zeros(h, h), torch.eye(h)], dim=1))
    ids = tokens(2, 9)
    assert_close(model(ids, num_steps=1).logits, plain(ids).logits)
    assert [block.mixer for block in model.model.layers] == [
        *(block.mixer for block in model.model.prelude), *(block.mixer for block in model.model.core.layers),
        *(block.mixer for block in model.model.coda),
    ]  # fmt: skip


@every_shape
@torch.no_grad()
def test_only_the_number_of_iterations_counts_for_the_values(shape):
    model, ids = build(shape), tokens(2, 9)
    logits = [model(ids, num_steps=steps).logits for steps in (5, (5, 0), (3, 2), (0, 5), None)]
    assert all(torch.equal(other, logits[0]) for other in logits[1:])
    assert not torch.allclose(model(ids, num_steps=4).logits, logits[0])
    assert not torch.allclose(model(ids, num_steps=5, row_keys=KEYS).logits, logits[0])


def test_how_many_iterations_there_are():
    depth = DepthOptions(mean_recurrence=32, backprop_depth=8)
    assert depth.steps(None, training=True) == (24, 8) and depth.steps(None, training=False) == (32, 0)
    assert depth.steps(5, training=True) == (0, 5) and depth.steps(8, training=True) == (0, 8)
    assert depth.steps(9, training=True) == (1, 8) and depth.steps(9, training=False) == (9, 0)
    assert depth.steps((4, 3), training=False) == (4, 3) and depth.steps((1, 0), training=True) == (1, 0)
    for bad in (0, -1, (0, 0), (-1, 3), (3, -1)):
        with pytest.raises(ValueError, match="at least 1 iteration"):
            depth.steps(bad, training=True)
    model, ids = build("attention").train(), tokens(2, 6)
    with mock.patch.object(model.model.core, "advance", wraps=model.model.core.advance) as advance:
        loss_of(model, ids, None).backward()
        assert advance.call_count == 5
        model.eval()(ids, num_steps=7)
        assert advance.call_count == 12


def test_iterations_without_a_gradient_leave_the_core_without_one():
    model, ids = build("attention").train(), tokens(2, 6)
    loss_of(model, ids, (4, 0)).backward()
    for name, grad in gradients(model).items():
        assert (grad is None) == name.startswith(("model.core", "model.prelude", "model.embed")), name


@every_shape
@pytest.mark.parametrize("steps", [(0, 1), (3, 2)], ids=str)
def test_recomputing_iterations_changes_no_bit(shape, steps):
    model, ids = build(shape, torch.float32).train(), tokens(2, 12)
    cu_seqlens = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    found, forwards = [], []
    model.model.core.layers[0].mixer.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    for recompute in (False, True):
        model.zero_grad()
        forwards.clear()
        model.set_recompute(recompute)
        loss = loss_of(model, ids, steps, cu_seqlens=cu_seqlens)
        loss.backward()
        found.append((loss, gradients(model)))
        assert forwards == [False] * steps[0] + [True] * steps[1] * (1 + recompute)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", ["attention", "attention, diagonal"])
def test_gradients_under_autocast_are_those_of_single_precision(shape, recompute):
    """Weights that autocast casts while there is no gradient must not be used where there is one."""
    model, ids = build(shape, torch.float32).train(), tokens(2, 16)
    model.set_recompute(recompute)
    loss_of(model, ids, (3, 2)).backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, ids, (3, 2))
    loss.backward()
    for name, grad in gradients(model).items():
        assert grad is not None, name
        assert (grad - expected[name]).norm() < 0.05 * expected[name].norm(), name


def test_the_state_keeps_its_type_under_autocast():
    model, seen = build("attention", torch.float32), []
    model.model.core.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(tokens(1, 4), num_steps=3)
    assert seen == [torch.float32] * 3


def test_one_iteration_is_compiled(monkeypatch):
    """The loop is outside: compiled are an iteration without a gradient, one from a constant and one from that."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traced, without a C++ compiler
    depth = replace(DEPTH, prelude_layers=0, coda_layers=0)
    options = replace(HUGINN, num_hidden_layers=1, layer_pattern=("mamba2",), intermediate_size=16, depth=depth)
    plain = build(options, torch.float32).train()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    ids, made = tokens(2, 12), []
    for steps in ((2, 2), (0, 1), (4, 3)):
        losses = [loss_of(model, ids, steps) for model in (plain, compiled)]
        torch.testing.assert_close(*losses)
        for model, loss in zip((plain, compiled), losses):
            model.zero_grad()
            loss.backward()
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for p, q in zip(plain.parameters(), compiled.parameters()):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3)
    assert made[-1] == made[0], "other numbers of iterations compile nothing new"


# the diagonal injection


def test_a_contracting_state_stays_bounded():
    """The layers add something bounded in each iteration, for they read a normed state: with Ā < 1 that stays so, with
    Ā = 1 it adds up."""
    model, ids = build(PARCAE), tokens(2, 8)
    body, norms = model.model, {}
    for contracting in (True, False):
        if not contracting:
            body.core.injection.A_log.data.fill_(-torch.inf)
        layout = Layout.of_rows((2, 8), torch.zeros(2, dtype=torch.long))
        with torch.no_grad():
            x = body.embed(ids)
            body.prepare_attention(layout, None, x.dtype)
            e = body.run(body.prelude, x, layout)
            s = body.initial_state(e, layout)
            sizes = []
            for _ in range(400):
                s = body.core.iterate(s, e, layout)
                sizes.append(s.norm(dim=-1).max().item())
        norms[contracting] = sizes
    assert max(norms[True][200:]) < 2 * max(norms[True][:20])
    assert norms[False][399] > 1.8 * norms[False][199] > 3 * norms[False][99]


def test_the_linear_part_goes_to_its_fixed_point():
    model = build(PARCAE)
    core = model.model.core
    for block in core.layers:
        block.mixer.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    layout = Layout.of_rows((1, 4), torch.zeros(1, dtype=torch.long))
    e = torch.randn(1, 4, PARCAE.hidden_size, dtype=torch.float64)
    model.model.prepare_attention(layout, None, e.dtype)
    s = 1e6 * torch.ones_like(e)
    with torch.no_grad():
        for _ in range(120):
            s = core.iterate(s, e, layout)
        step = F.softplus(core.injection.dt_bias)
        decay = torch.exp(-step * core.injection.A_log.exp())
        driven = step * F.linear(core.injection.e_norm(e), core.injection.B)
    assert ((decay > 0) & (decay < 1)).all()
    torch.testing.assert_close(s, driven / (1 - decay), rtol=1e-6, atol=1e-6)


def test_the_injections_start_and_are_marked_as_the_papers_have_it():
    torch.manual_seed(0)
    injection = RiverrunForCausalLM(RiverrunConfig.from_options(PARCAE)).model.core.injection
    decay = torch.exp(-F.softplus(injection.dt_bias) * injection.A_log.exp())
    torch.testing.assert_close(decay, torch.full_like(decay, DECAY))
    assert torch.equal(injection.B, torch.eye(PARCAE.hidden_size)) and torch.equal(injection.B, injection.C)
    undecayed = {name for name, p in injection.named_parameters() if getattr(p, "no_weight_decay", False)}
    assert undecayed == {"A_log", "dt_bias", "B", "C"}
    assert {name for name, p in injection.named_parameters() if getattr(p, "keep_fp32", False)} == {"A_log", "dt_bias"}
    s = torch.randn(3, 5, PARCAE.hidden_size)
    assert torch.equal(injection.read_out(s), s)
