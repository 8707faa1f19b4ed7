"""Gated memories read at the starts of long chunks: the operator against the general chunks, its passes in Triton (run
by the interpreter) against those in torch."""

from pathlib import Path

import pytest
import torch
from compiling import CARDS
from torch.nn.functional import normalize

from riverrun.kernels.common import self_check
from riverrun.kernels.neural_memory import Gates, MemoryState, Rule, long_chunks, long_chunks_walk, neural_memory
from riverrun.kernels.neural_memory.chunked import neural_memory_chunked
from riverrun.kernels.neural_memory.long_chunks import gates_in_torch, neural_memory_long
from riverrun.kernels.neural_memory.triton_long_gates import long_gates_triton
from tests.kernels.test_neural_memory import assert_close, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, K, F, V = 2, 6, 5, 4
RULE = Rule(chunk_size=8, read="chunk", activation="silu", gated=True)
RULES = {
    "silu": RULE,
    "gelu": Rule(chunk_size=8, read="chunk", gated=True),
    "dot": Rule(chunk_size=8, read="chunk", bias="dot", gated=True),
}


def make(B, T, momentum=True, layers=1, dtype=torch.float64, sizes=(K, F, V)):
    """q, k, v, the gates, and a state in the middle of something."""
    generator, (K, F, V) = torch.Generator().manual_seed(0), sizes

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE)

    def leaf(x):
        return x.to(torch.promote_types(dtype, torch.float32)).requires_grad_()

    tokens = [*(normalize(randn(B, T, H, K), dim=-1) for _ in range(2)), randn(B, T, H, V)]
    tokens = [x.to(dtype).requires_grad_() for x in tokens]
    gates = [
        Gates(
            leaf(-randn(B, T, H).abs() / 50),
            leaf(randn(B, T, H).sigmoid() / 4),
            leaf(-randn(B, T, H).abs()) if momentum else None,
        )
        for _ in range(layers)
    ]
    weights, still = (
        tuple(leaf(scale * randn(B, H, n, m) / n**0.5) for n, m in ((K, F), (K, F), (F, V))) for scale in (1, 0.3)
    )
    return tokens, tuple(gates) * (3 // layers), MemoryState(weights, still if momentum else None, weights)


def run(form, tokens, gates, state, rule, of_state=True):
    """The outputs, and the gradients of all of them or of o alone."""
    o, left = form(*tokens, state, gates, rule)
    inputs = leaves([*tokens, *{id(g): g for g in gates}.values(), state.weights, state.momentum])
    generator = torch.Generator().manual_seed(1)
    outputs = [o, *leaves(left._replace(anchor=None) if of_state else None)]
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    grads = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)
    return [o, *leaves(left)], grads


def general(q, k, v, state, gates, rule):
    return neural_memory_chunked(q, k, v, state, gates, rule, None, None, None, None, None)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("T", [2, 8, 16, 21])
def test_equals_the_general_form(name, momentum, layers, T):
    given = make(2, T, momentum, layers)
    for of_state in (True, False):
        got, want = (run(form, *given, RULES[name], of_state) for form in (neural_memory_long, general))
        assert_close(got[0], want[0], 1e-12)
        assert_close(got[1], want[1], 1e-10)


@pytest.mark.parametrize("T", [5, 16, 21])
def test_what_is_left_can_be_gone_on_with(T):
    """Where the last chunk begins is in the state too."""
    tokens, gates, state = make(2, T)
    with torch.no_grad():
        got = neural_memory_long(*tokens, state, gates, RULE)
        assert_close(got, general(*tokens, state, gates, RULE), 1e-12)
        o, left = neural_memory_long(*tokens, state, gates, RULE, resumable=False)
    assert_close([o, left.weights, left.momentum], [got[0], got[1].weights, got[1].momentum], 1e-12)


def test_without_gradients_nothing_is_kept():
    given = make(2, 21)
    want, _ = run(neural_memory_long, *given, RULE)
    with torch.no_grad():
        o, left = neural_memory_long(*given[0], given[2], given[1], RULE)
    assert_close([o, *leaves(left)], want, 0)


def of_one(given):
    """All sequences start from the first one's state."""
    tokens, gates, state = given
    return tokens, gates, state.each(lambda x: x[:1].detach().requires_grad_())


def general_of_one(q, k, v, state, gates, rule):
    return general(q, k, v, state.each(lambda x: x.expand(len(q), -1, -1, -1)), gates, rule)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("T", [5, 16, 21])
@pytest.mark.parametrize("of_state", [True, False])
def test_one_state_for_all(momentum, T, of_state):
    """Also where no chunk ends."""
    given = of_one(make(2, T, momentum))
    got, want = (run(form, *given, RULE, of_state) for form in (neural_memory_long, general_of_one))
    assert_close(got[0], want[0], 1e-12)
    assert_close(got[1], want[1], 1e-10)


@pytest.fixture
def anywhere(monkeypatch):
    for module in (long_chunks, long_chunks_walk):
        monkeypatch.setattr(module, "fused", lambda x: x.dtype != torch.float64)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("T", "sizes"), [(16, (K, F, V)), (21, (16, 24, 40))])
def test_passes_in_triton(anywhere, name, momentum, layers, T, sizes):
    for of_state in (True, False):
        got, want = (
            run(neural_memory_long, *make(2, T, momentum, layers, dtype, sizes), RULES[name], of_state)
            for dtype in (torch.float32, torch.float64)
        )
        assert_near(got, want)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("of_state", [True, False])
@pytest.mark.parametrize("T", [5, 21])
def test_one_state_for_all_in_triton(anywhere, momentum, of_state, T):
    got, want = (
        run(neural_memory_long, *of_one(make(3, T, momentum, dtype=dtype)), RULE, of_state)
        for dtype in (torch.float32, torch.float64)
    )
    assert_near(got, want)


def assert_near(got, want):
    for g, w in zip(leaves(got), leaves(want), strict=True):
        assert (g.double() - w).norm() <= 1e-5 * w.norm().clamp_min(1e-3)


def test_wide_layers_take_several_blocks(anywhere):
    want = run(neural_memory_long, *make(1, 3, sizes=(4, 600, 520)), RULE)
    got = run(neural_memory_long, *make(1, 3, dtype=torch.float32, sizes=(4, 600, 520)), RULE)
    assert_near(got, want)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("T", [1, 8, 21])
@pytest.mark.parametrize("value", [None, 0.0, -40.0, -torch.inf])
def test_gates_in_triton(momentum, T, value):
    """Also where nothing is kept of weights or of the momentum at some tokens."""
    generator = torch.Generator().manual_seed(0)
    log_keep, lr, log_momentum = (-torch.rand(3, 2, T, H, generator=generator) / 4 for _ in range(3))
    for x, every in ((log_keep, 3), (log_momentum, 5)):
        if value is not None:
            x[:, :, ::every] = value
    gates = [x.to(DEVICE).requires_grad_() for x in (log_keep, -lr, log_momentum)[: 2 + momentum]]
    wide = [x.detach().double().requires_grad_() for x in gates]
    made, want = (form(*xs, *[None][momentum:], 8) for form, xs in ((long_gates_triton, gates), (gates_in_torch, wide)))
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in made]
    grads = torch.autograd.grad(made, gates, upstream)
    expected = torch.autograd.grad(want, wide, [x.double() for x in upstream])
    for g, w in zip((*made, *grads), (*want, *expected), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6)


def deviations(form, of_state=False, **options):
    """In bfloat16, from the general form in float64 of the same inputs: of o, and the largest of gradients."""
    tokens, gates, state = make(2, 64, dtype=torch.bfloat16, sizes=(32, 32, 32), **options)
    wide = [x.detach().double().requires_grad_() for x in tokens]
    want = run(general, wide, *double(gates, state), RULE, of_state)
    got = run(form, tokens, gates, state, RULE, of_state)
    off = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(leaves(got), leaves(want), strict=True)]
    return off[0], max(off[len(got[0]) :])


def double(gates, state):
    """Shared gates stay shared."""
    (gates,) = {id(g): g for g in gates}.values()
    gates, state = (x.each(lambda t: t.detach().double().requires_grad_()) for x in (gates, state))
    return (gates,) * 3, state


def test_rounding_is_no_worse_than_the_general_forms():
    """In torch: the interpreter cuts what it rounds to bfloat16."""
    got, want = deviations(neural_memory_long, True), deviations(general, True)
    assert got[0] <= want[0] and got[1] <= want[1], (got, want)


def test_by_way_of_the_op(anywhere):
    tokens, gates, state = make(2, 21, dtype=torch.float32)
    weights = tuple(w[0].detach() for w in state.weights)
    options = {"rule": RULE, "resumable": False}
    (o, left), (want, expected) = (
        neural_memory(*tokens, weights, gates[0], backend=backend, **options) for backend in ("triton", "chunked")
    )
    assert_close([o, left.weights], [want, expected.weights], 1e-5)
    bounds = torch.tensor([0, 9, 21])
    for change in ({"norm_weight": torch.ones(H, V)}, {"rule": Rule(chunk_size=4, read="chunk", gated=True)}):
        with pytest.raises(ValueError, match="there is no Triton kernel"):
            neural_memory(*tokens, weights, gates[0], backend="triton", **options | change)
    one = [x[:1] for x in tokens], gates[0].each(lambda x: x[:1])
    with pytest.raises(ValueError, match="there is no Triton kernel"):
        neural_memory(*one[0], weights, one[1], backend="triton", cu_seqlens=bounds, **options)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layers", [1, 3])
def test_self_check(anywhere, monkeypatch, tmp_path, name, layers):
    """That of each case agrees, of the way there and back."""
    monkeypatch.setattr(self_check, "INTERPRETED_TOO", True)
    monkeypatch.setattr(self_check, "_folder", lambda: tmp_path)
    monkeypatch.setattr(self_check, "_agreed", set())
    for momentum in (True, False):
        run(neural_memory_long, *make(1, 8, momentum, layers, torch.float32), RULES[name])
    assert len(list(tmp_path.iterdir())) == 8  # and those of the gates


@pytest.mark.parametrize("form", [torch.compile, lambda f, **_: f])
def test_operator_is_sound(form):
    """Its empty outputs are shaped like the true ones."""
    given = make(2, 21)

    def both(*tokens):
        o, left = neural_memory_long(*tokens, given[2], given[1], RULE)
        return o, left.weights[0]

    traced = form(both, backend="aot_eager", fullgraph=True)
    want, got = ([*f(*given[0]), *torch.autograd.grad(f(*given[0])[0].sum(), given[0])] for f in (both, traced))
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("card", CARDS)
def test_kernels_compile_without_spilling(card):
    compiler, _ = CARDS[card]
    kernels = compiler(Path(__file__).with_name("launches_neural_memory_long.py"))
    names = "move", "hidden", "hidden_back", "gradients", "errors", "step", "step_back"
    assert {k["kernel"] for k in kernels} == {f"{name}_kernel" for name in (*names, "forward", "backward")}
    assert all(k["stack"] == 0 for k in kernels)
