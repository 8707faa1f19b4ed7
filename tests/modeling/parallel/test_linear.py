"""Linear recurrences on rows that two and four ranks share, both ways, against the op on the whole rows."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from riverrun.kernels.causal_conv1d import causal_conv1d
from riverrun.kernels.diagonal_scan import diagonal_scan
from riverrun.kernels.gated_delta import gated_delta
from riverrun.kernels.ssd import ssd
from riverrun.modeling.parallel import linear
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.conv import with_inputs_before
from riverrun.modeling.parallel.linear import context_diagonal_scan, context_gated_delta, context_ssd
from riverrun.modeling.parallel.mesh import Axis
from tests.modeling.parallel import rows
from tests.modeling.parallel.rows import LENGTH, ROWS, Case
from tests.modeling.parallel.test_context import LAYOUTS

every_layout = pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS)
both_methods = pytest.mark.parametrize("method", ["states", "heads"])
CHUNK = 3


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def tokens(*shape, dtype=torch.float64):
    return randn(ROWS, LENGTH, *shape, dtype=dtype)


def of_ssd(H, G):
    """x, dt, B, C; A, D, dt_bias."""

    def shared(context, x, dt, B, C, A, D, bias):
        return context_ssd(context, x, dt, A, B, C, D, dt_bias=bias, chunk_size=CHUNK)

    def whole(cu_seqlens, x, dt, B, C, A, D, bias):
        return ssd(x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True, cu_seqlens=cu_seqlens, backend="reference")[0]

    return Case(
        lambda: [tokens(H, 3), tokens(H) - 1, tokens(G, 5), tokens(G, 5)],
        lambda: [-randn(H).exp() / 4, randn(H), randn(H)],
        whole,
        shared,
    )


def of_gated_delta(H, n, gate=True, beta=None):
    """q, k, v, beta, g; the last if there is a gate."""

    def make():
        made = [tokens(H, 4), tokens(n, H, 4), tokens(n, H, 3), 2 * tokens(n, H).sigmoid()]
        if beta is not None:
            made[3].fill_(beta)
        return made + ([-tokens(H).exp() / 4] if gate else [])

    def shared(context, q, k, v, beta, g=None):
        return context_gated_delta(context, q, k, v, beta, g, beta_max=2.0, chunk_size=CHUNK)

    def whole(cu_seqlens, q, k, v, beta, g=None):
        return gated_delta(q, k, v, beta, g, qk_l2norm=True, cu_seqlens=cu_seqlens, backend="reference")[0]

    return Case(make, list, whole, shared)


def of_diagonal_scan(dtype, constant):
    """x and a, of tokens or constant."""

    def decays(*shape):
        return randn(*shape, dtype=dtype).sgn() * torch.rand(shape, dtype=torch.float64).sqrt()

    def whole(cu_seqlens, x, a):
        return diagonal_scan(x, a, cu_seqlens=cu_seqlens, backend="reference")[0]

    if constant:
        return Case(lambda: [tokens(3, dtype=dtype)], lambda: [decays(3)], whole, context_diagonal_scan)
    return Case(lambda: [tokens(3, dtype=dtype), decays(ROWS, LENGTH, 3)], list, whole, context_diagonal_scan)


def of_layers(how):
    """Two layers, each a convolution, an SSD and a delta rule, one after the other; under checkpoints where shared."""
    H, P = 4, 3
    short, outer = of_ssd(H, 2), of_gated_delta(H, 2)

    def run(conv, ssd, delta, call, x, dt, B, C, q, k, beta, g, A, D, bias, weight):
        def layer(x):
            u = conv(x, weight, None, "silu").unflatten(2, (H, P))
            u = ssd(u, dt, B, C, A, D, bias)
            u = delta(q, k, torch.stack([u, u.flip(-1)], dim=2), beta, g)
            return x + u.flatten(2)

        return call(layer, call(layer, x))

    def shared(context, *args):
        call = partial(checkpoint, use_reentrant=False) if how == "checkpoint" else lambda f, x: f(x)

        def conv(x, weight, bias, activation):
            ((x, before),) = with_inputs_before(context, [x], weight.shape[1])
            return causal_conv1d(
                x, weight, bias, activation=activation, initial_state=before, cu_seqlens=context.cu_seqlens
            )[0]  # fmt: skip

        return run(conv, partial(short.shared, context), partial(outer.shared, context), call, *args)

    def whole(cu_seqlens, *args):
        def conv(x, weight, bias, activation):
            return causal_conv1d(x, weight, bias, activation=activation, cu_seqlens=cu_seqlens)[0]

        return run(conv, partial(short.whole, cu_seqlens), partial(outer.whole, cu_seqlens), lambda f, x: f(x), *args)

    def make():
        _, dt, B, C = short.tokens()
        q, k, _, beta, g = outer.tokens()
        return [tokens(H * P), dt, B, C, q, k, beta, g]

    return Case(make, lambda: [*short.params(), randn(H * P, 4)], whole, shared)


CASES = {
    "ssd of one group": of_ssd(4, 1),
    "ssd of two groups": of_ssd(4, 2),
    "ssd of as many groups as heads": of_ssd(8, 8),
    "gated_delta": of_gated_delta(4, 1),
    "gated_delta of two steps": of_gated_delta(4, 2),
    "gated_delta of three steps, reflections": of_gated_delta(4, 3, gate=False, beta=2.0),
    "ssd, heads and groups that do not divide": of_ssd(3, 3),
    "ssd, groups that do not fit": of_ssd(12, 3),
    "gated_delta, heads that do not divide": of_gated_delta(3, 1),
    "diagonal_scan": of_diagonal_scan(torch.float64, False),
    "diagonal_scan, constant": of_diagonal_scan(torch.float64, True),
    "diagonal_scan, complex": of_diagonal_scan(torch.complex128, False),
    "diagonal_scan, complex, constant": of_diagonal_scan(torch.complex128, True),
    "layers": of_layers("plain"),
    "layers, checkpoint": of_layers("checkpoint"),
}
SHARE = list(CASES)[:6]
REST = list(CASES)[6:13]
LAYERS = list(CASES)[13:]


def part(name, *args):
    return rows.part(CASES[name], *args)


def assert_equal(ranks, name, bounds, cp, method):
    results = ranks(cp).run(part, name, bounds, cp, method)
    rows.assert_parts_make_the_whole(results, CASES[name], bounds)


@both_methods
@every_layout
@pytest.mark.parametrize("name", SHARE)
@pytest.mark.parametrize("cp", [2, 4])
def test_both_ways_equal_the_whole(ranks, cp, name, bounds, method):
    assert_equal(ranks, name, bounds, cp, method)


@every_layout
@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("cp", [2, 4])
def test_states_where_heads_do_not_divide(ranks, cp, name, bounds):
    assert_equal(ranks, name, bounds, cp, "auto")


@both_methods
@every_layout
@pytest.mark.parametrize("name", LAYERS)
def test_layers(ranks, name, bounds, method):
    assert_equal(ranks, name, bounds, 4, method)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [SHARE[0], SHARE[5]])
def test_states_stay_in_float32(ranks, name, autocast):
    bounds = LAYOUTS["one document a row"]
    results = ranks(4).run(part, name, bounds, 4, "states", torch.float32, autocast)
    rows.assert_parts_make_the_whole(results, CASES[name], bounds, torch.float32, rtol=1e-5)


def refuse(name):
    """The message with which ranks refuse to move heads."""
    with pytest.raises(ValueError) as error:
        part(name, LAYOUTS["one document a row"], 4, "heads")
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ssd, heads and groups that do not divide", "3 heads among parallel.cp=4"),
        ("gated_delta, heads that do not divide", "3 heads among parallel.cp=4"),
        ("ssd, groups that do not fit", "3 groups of heads among parallel.cp=4"),
    ],
)
def test_heads_that_cannot_be_moved(ranks, name, what):
    for message in ranks(4).run(refuse, name):
        assert what in message and "parallel.linear='states'" in message


class Chosen(Exception):
    pass


def crossover(cp, call):
    """The fewest tokens a rank for which "auto" hands on states."""

    def takes_heads(self, heads, cheaper):
        raise Chosen(cheaper)

    def cheaper(T):
        context = Context.of_rows(Axis(cp, 0), 1, T * cp, [0, T * cp], "cpu")
        with mock.patch.object(Context, "takes_heads", takes_heads), pytest.raises(Chosen) as chosen:
            call(context, partial(torch.empty, dtype=torch.bfloat16, device="meta"), T)
        return chosen.value.args[0]

    return next(T for T in range(1, 4096) if not cheaper(T))


def mamba2(context, empty, T, H=64, G=8):
    x, dt, B, heads = empty(1, T, H, 64), empty(1, T, H), empty(1, T, G, 128), empty(H)
    context_ssd(context, x, dt, heads, B, B, heads, dt_bias=heads, chunk_size=64)


def gated_deltanet(context, empty, T, H=32):
    q, k, beta = empty(1, T, H, 128), empty(1, T, 1, H, 128), empty(1, T, 1, H)
    context_gated_delta(context, q, k, k, beta, beta[:, :, 0], beta_max=1.0, chunk_size=64)


@pytest.mark.parametrize(
    ("call", "cp", "tokens"), [(gated_deltanet, 2, 128), (gated_deltanet, 8, 1024), (mamba2, 2, 146), (mamba2, 8, 583)]
)
def test_few_tokens_a_rank_move_heads(call, cp, tokens):
    """Where both methods move as many bytes: cp − 1 summaries, or a share of all inputs and outputs. Between two
    ranks a summary is half of one: nothing passes through a shard."""
    assert tokens / 1.5 < crossover(cp, call) < tokens * 1.5


def test_a_group_that_all_ranks_need_goes_to_all():
    assert crossover(8, partial(mamba2, G=1)) == crossover(8, mamba2) > crossover(8, partial(mamba2, G=2))


@pytest.mark.parametrize(
    "call", [partial(gated_deltanet, H=30), partial(mamba2, H=30, G=1), partial(mamba2, H=12, G=3)]
)
def test_heads_that_do_not_divide_stay(call):
    assert crossover(4, call) == 1


def in_triton(name, bounds, cp):
    """A part, its recurrence run by Triton's interpreter."""
    with (
        mock.patch.object(linear, "ssd_backend", lambda *_: "triton"),
        mock.patch.object(linear, "gated_delta_backend", lambda *_: "triton"),
    ):
        return part(name, bounds, cp, "states", torch.float32)


@pytest.mark.parametrize(
    ("name", "bounds", "cp"),
    [
        ("ssd of two groups", "one document a row", 4),  # states pass through shards
        ("gated_delta", "a document over all shards, and a short one", 2),
    ],
)
def test_kernels_carry_states_and_adjoints(ranks, name, bounds, cp):
    results = ranks(cp).run(in_triton, name, LAYOUTS[bounds], cp)
    rows.assert_parts_make_the_whole(results, CASES[name], LAYOUTS[bounds], torch.float32, rtol=3e-5)
