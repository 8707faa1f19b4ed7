"""neural_memory: chunks against the token loop in float64, the token loop against the papers' special cases."""

import functools
from dataclasses import replace

import pytest
import torch

from riverrun.kernels.gated_delta import gated_delta
from riverrun.kernels.neural_memory import (
    Gates,
    MemoryState,
    Rule,
    fresh_state,
    neural_memory,
    read_memory,
    write_memory,
)

H, K = 2, 4
DOCUMENTS = [1, 9, 1, 1, 17, 4]
LINEAR, MLP = Rule(), Rule(residual=True)


def make(B, T, layers=1, V=K, gated=False, norm=False, momentum=True, gate="shared", rule=LINEAR, seed=0):
    """The arguments of `neural_memory`, all leaves; the steps are small enough for every rule."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    rand = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    F = 5
    sizes = [(K, F), (K, F), (F, V)] if gated else list(zip([K, *[F] * (layers - 1)], [*[F] * (layers - 1), V]))
    weights = tuple(0.5 * randn(H, *size) for size in sizes)

    def gates_of(*extra):
        return Gates(-rand(B, T, H, *extra) / 4, 0.3 * rand(B, T, H, *extra), -rand(B, T, H) if momentum else None)

    gates = {
        "shared": lambda: gates_of(),
        "layer": lambda: tuple(gates_of() for _ in sizes),
        "channel": lambda: tuple(gates_of(size[1]) for size in sizes),
    }[gate]()
    arguments = {
        "q": randn(B, T, H, K),
        "k": torch.nn.functional.normalize(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, H, V),
        "weights": weights,
        "gates": gates,
        "norm_weight": 1 + 0.1 * randn(H, V) if norm else None,
        "delta": 1.5 + rand(B, T, H) if rule.bias == "huber" else None,
        "gamma": rand(B, T, H) if rule.window > 1 else None,
    }
    for leaf in leaves(arguments):
        leaf.requires_grad_()
    return arguments


def leaves(x):
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x or ()
    return [leaf for part in parts for leaf in leaves(part)]


def initial(arguments, rule, sequences, seed=1):
    """A state in the middle of something."""
    generator = torch.Generator().manual_seed(seed)
    gates = arguments["gates"]
    momentum = (gates if isinstance(gates, Gates) else gates[0]).log_momentum is not None
    like = fresh_state(arguments["weights"], sequences, rule, momentum, arguments["v"].shape[-1])
    return MemoryState(*(
        None if part is None
        else tuple(torch.rand(t.shape, generator=generator, dtype=t.dtype).sub(0.3).requires_grad_() for t in part)
        for part in like
    ))  # fmt: skip


def forward_and_gradients(arguments, state=None, **options):
    o, left = neural_memory(**arguments, initial_state=state, **options)
    outputs = [o, *leaves(left)]
    generator = torch.Generator().manual_seed(2)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    inputs = leaves({k: v for k, v in arguments.items() if k != "weights" or state is None}) + leaves(state)
    # an anchor that is stale, or a value that a loss does not look at, gets none
    return outputs, torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def assert_equal_to_reference(arguments, state=None, **options):
    got = forward_and_gradients(arguments, state, backend="chunked", **options)
    expected = forward_and_gradients(arguments, state, backend="reference", **options)
    for tolerance, g, e in zip((1e-12, 1e-10), got, expected):
        assert_close(g, e, tolerance)


def assert_close(got, expected, tolerance):
    """Relative to norms: a memory with a norm amplifies rounding by up to a hundred."""
    for g, e in zip(leaves(got), leaves(expected), strict=True):
        assert torch.isfinite(g).all()
        assert (g - e).norm() <= tolerance * e.norm().clamp_min(1)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


MIRAS = {"layers": 2, "norm": True, "momentum": False}
VARIANTS = {
    "linear": ({}, LINEAR),
    "linear, no momentum": ({"momentum": False}, LINEAR),
    "linear, V ≠ K, every output": ({"V": 3, "gate": "channel"}, LINEAR),
    "linear with residual": ({}, MLP),
    "two layers": ({"layers": 2}, MLP),
    "two layers with norm": ({"layers": 2, "norm": True}, MLP),
    "two layers, gates of each": ({"layers": 2, "gate": "layer"}, replace(MLP, activation="silu")),
    "two layers, every output": ({"layers": 2, "gate": "channel"}, MLP),
    "three layers": ({"layers": 3, "momentum": False, "norm": True}, MLP),
    "gated": ({"gated": True}, replace(MLP, gated=True)),
    "read before": ({"layers": 2}, replace(MLP, read="before")),
    "linear, read before": ({}, replace(LINEAR, read="before")),
    "read the chunk's": ({"gated": True}, replace(MLP, gated=True, read="chunk")),
    "read the chunk's, no momentum": ({"layers": 2, "momentum": False}, replace(MLP, read="chunk")),
    "dot": ({}, replace(LINEAR, bias="dot")),
    "Moneta": (MIRAS | {"gate": "channel"}, replace(MLP, bias="lp", retention="lq")),
    "Yaad": (MIRAS | {"gate": "channel"}, replace(MLP, bias="huber")),
    "Memora": (MIRAS, replace(MLP, retention="softmax", read="chunk")),
    "Omega": ({"layers": 2}, replace(MLP, window=3)),
    "Omega, linear, long window": ({"momentum": False}, replace(LINEAR, window=8)),
    "ATLAS": ({"layers": 2}, replace(MLP, window=3, newton_schulz=5, read="chunk")),
    "ATLAS, gated": ({"gated": True}, replace(MLP, gated=True, window=2, newton_schulz=2, read="chunk")),
}  # fmt: skip


def variant(name, B, T, **options):
    make_options, rule = VARIANTS[name]
    return make(B, T, rule=rule, **make_options, **options), rule


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_chunks_equal_the_token_loop(name, chunk_size):
    arguments, rule = variant(name, 2, 11)
    assert_equal_to_reference(arguments, rule=replace(rule, chunk_size=chunk_size))


@pytest.mark.parametrize("name", ["linear", "two layers with norm", "ATLAS", "Moneta"])
@pytest.mark.parametrize(("T", "chunk_size"), [(1, 1), (1, 4), (5, 4), (16, 16), (130, 128), (40, 32), (7, 64)])
def test_chunks_of_any_size(name, T, chunk_size):
    arguments, rule = variant(name, 1, T)
    assert_equal_to_reference(arguments, rule=replace(rule, chunk_size=chunk_size))


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_do_not_meet(name):
    arguments, rule = variant(name, 1, sum(DOCUMENTS))
    rule = replace(rule, chunk_size=4)
    assert_equal_to_reference(arguments, rule=rule, cu_seqlens=bounds_of(DOCUMENTS))
    state = initial(arguments, rule, len(DOCUMENTS))
    assert_equal_to_reference(arguments, state, rule=rule, cu_seqlens=bounds_of(DOCUMENTS))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_from_the_middle_of_a_chunk(name, chunk_size):
    arguments, rule = variant(name, 3, 9)
    rule = replace(rule, chunk_size=chunk_size)
    state = initial(arguments, rule, 3)
    assert_equal_to_reference(arguments, state, rule=rule, position=torch.tensor([3, 0, 6]))


@pytest.mark.parametrize("name", VARIANTS)
def test_any_split_gives_the_same(name):
    arguments, rule = variant(name, 2, 11)
    rule = replace(rule, chunk_size=4)
    whole, last = neural_memory(**arguments, rule=rule)
    for splits in ([1] * 11, [5, 6], [4, 1, 3, 3], [10, 1]):
        outputs, state, at = [], None, 0
        for T in splits:
            part = {n: cut(x, at, at + T) if n not in ("weights", "norm_weight") else x for n, x in arguments.items()}
            position = None if state is None else torch.full((2,), at)
            o, state = neural_memory(**part, rule=rule, initial_state=state, position=position)
            outputs.append(o)
            at += T
        assert_close(torch.cat(outputs, 1), whole, 1e-12)
        assert_close(state, last, 1e-12)


def cut(x, start, end):
    if x is None or isinstance(x, torch.Tensor):
        return None if x is None else x[:, start:end]
    return type(x)(*(cut(t, start, end) for t in x)) if isinstance(x, Gates) else tuple(cut(t, start, end) for t in x)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_a_later_one(name):
    arguments, rule = variant(name, 1, 9)
    rule = replace(rule, chunk_size=4)
    with torch.no_grad():
        before, _ = neural_memory(**arguments, rule=rule)
        for j in range(9):
            changed = {n: x if n in ("weights", "norm_weight") else spoil(x, j) for n, x in arguments.items()}
            after, _ = neural_memory(**changed, rule=rule)
            assert torch.equal(after[:, :j], before[:, :j]) and not torch.equal(after[:, j], before[:, j])


def spoil(x, j):
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        x = x.clone()
        x[:, j] *= 0.5
        return x
    return type(x)(*(spoil(t, j) for t in x)) if isinstance(x, Gates) else tuple(spoil(t, j) for t in x)


def test_linear_online_memory_is_exact_in_any_kernel_chunk():
    from riverrun.kernels.neural_memory.chunked import neural_memory_chunked

    arguments, rule = variant("linear", 2, 37)
    expected, left = neural_memory(**arguments, rule=rule, backend="reference")
    state = fresh_state(arguments["weights"], 2, rule, True, K)
    for size in (1, 5, 16, 37, 64):
        q, k, v, gates = (arguments[n] for n in ("q", "k", "v", "gates"))
        o, got = neural_memory_chunked(q, k, v, state, (gates,), rule, None, None, None, None, None, online_chunk=size)
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(leaves(got), leaves(left), rtol=1e-12, atol=1e-12)


# special cases


def test_without_gates_it_is_the_delta_rule():
    a = make(2, 13, momentum=False)
    keep = torch.zeros_like(a["gates"].log_keep)
    o, state = neural_memory(**a | {"gates": Gates(keep, a["gates"].lr)}, rule=LINEAR)
    start = a["weights"][0].expand(2, -1, -1, -1)
    expected, final = gated_delta(
        a["q"], a["k"][:, :, None], a["v"][:, :, None], a["gates"].lr[:, :, None], scale=1.0, initial_state=start
    )
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.weights[0], final, rtol=1e-12, atol=1e-12)


def test_with_decay_it_is_gated_delta_with_other_strengths():
    """Gated DeltaNet decays first: keep a, then (1 − β k kᵀ). Titans erases θ / a of what is left, and writes θ."""
    a = make(2, 13, momentum=False)
    keep, lr = a["gates"].log_keep.exp(), a["gates"].lr
    o, _ = neural_memory(**a, rule=LINEAR)
    values = a["v"] * keep[..., None]  # β v = (θ / a) (a v)
    start = a["weights"][0].expand(2, -1, -1, -1)
    expected, _ = gated_delta(
        a["q"], a["k"][:, :, None], values[:, :, None], (lr / keep)[:, :, None], a["gates"].log_keep, scale=1.0,
        initial_state=start,
    )  # fmt: skip
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


def test_one_long_chunk_from_nothing_is_linear_attention():
    a = make(2, 13, momentum=False)
    a["weights"] = (torch.zeros_like(a["weights"][0]),)
    gates = Gates(torch.zeros_like(a["gates"].log_keep), a["gates"].lr)
    o, _ = neural_memory(**a | {"gates": gates}, rule=replace(LINEAR, chunk_size=13))
    q, k, v, lr = (x.transpose(1, 2) for x in (a["q"], a["k"], a["v"], gates.lr))
    expected = ((q @ k.mT).tril() @ (lr[..., None] * v)).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


def test_p_of_two_is_l2_and_a_wide_huber_too():
    a = make(1, 9, layers=2)
    expected, _ = neural_memory(**a, rule=replace(MLP, chunk_size=4))
    o, _ = neural_memory(**a, rule=replace(MLP, chunk_size=4, bias="lp", p=2.0))
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    wide = a | {"delta": torch.full_like(a["gates"].lr, 1e6)}
    o, _ = neural_memory(**wide, rule=replace(MLP, chunk_size=4, bias="huber"))
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)


def test_weights_of_memora_are_probabilities_and_of_moneta_normalised():
    from riverrun.kernels.neural_memory.network import weights_of

    for name, check in (
        ("Memora", lambda w: (w.sum(-2) - 1).abs().max()),
        ("Moneta", lambda w: 0),
    ):
        arguments, rule = variant(name, 2, 9)
        _, state = neural_memory(**arguments, rule=replace(rule, chunk_size=1))
        for a, w in zip(state.weights, weights_of(rule, state.weights)):
            assert check(w) < 1e-12
            if name == "Moneta":  # A = W ‖W‖_q^(q−2) inverts it up to the norms' ratio
                torch.testing.assert_close(w * (a**4).sum((-2, -1), keepdim=True) ** 0.5, a)


def test_orthogonal_updates_have_singular_values_near_one():
    from riverrun.kernels.neural_memory.network import orthogonalise

    x = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for y in (orthogonalise(x, 5), orthogonalise(x.mT, 5).mT):
        values = torch.linalg.svdvals(y)
        assert values.min() > 0.6 and values.max() < 1.3
        torch.testing.assert_close(y, orthogonalise(7 * x, 5), rtol=1e-5, atol=1e-5)


def test_the_gap_to_the_online_rule_closes_with_the_step():
    gaps = []
    for scale in (1.0, 0.1, 0.01):
        a = make(1, 64, layers=2)
        gates = a["gates"]._replace(lr=0.02 * scale * a["gates"].lr)
        online, _ = neural_memory(**a | {"gates": gates}, rule=MLP)
        chunks, _ = neural_memory(**a | {"gates": gates}, rule=replace(MLP, chunk_size=16))
        gaps.append(((online - chunks).norm() / online.norm()).item())
    assert gaps[0] > 1e-6 and all(gaps[i + 1] < 0.2 * gaps[i] for i in range(2)), gaps


# values that gates can take


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g._replace(log_keep=torch.full_like(g.log_keep, -torch.inf)),
        lambda g: g._replace(log_keep=torch.full_like(g.log_keep, -40.0), log_momentum=torch.zeros_like(g.lr)),
        lambda g: g._replace(log_momentum=torch.full_like(g.lr, -torch.inf)),
        lambda g: g._replace(lr=torch.zeros_like(g.lr)),
        lambda g: g._replace(log_keep=torch.zeros_like(g.lr), log_momentum=torch.full_like(g.lr, -40.0)),
    ],
)
@pytest.mark.parametrize("name", ["linear", "two layers"])
def test_extreme_gates(name, change):
    arguments, rule = variant(name, 2, 11)
    arguments["gates"] = Gates(*(x.detach().requires_grad_() for x in change(arguments["gates"])))
    assert_equal_to_reference(arguments, rule=replace(rule, chunk_size=4))


def test_no_steps_leave_a_decaying_memory():
    a = make(1, 6, layers=2)
    gates = Gates(a["gates"].log_keep, torch.zeros_like(a["gates"].lr), a["gates"].log_momentum)
    _, state = neural_memory(**a | {"gates": gates}, rule=MLP)
    kept = gates.log_keep.sum(1).exp()[0, :, None, None]
    for w, start in zip(state.weights, a["weights"]):
        torch.testing.assert_close(w[0], kept * start)


def test_what_a_memory_knows_already_changes_nothing():
    a = make(1, 6, momentum=False)
    known = torch.einsum("bthk,hkv->bthv", a["k"], a["weights"][0])
    gates = Gates(torch.zeros_like(a["gates"].lr), a["gates"].lr)
    _, state = neural_memory(**a | {"v": known, "gates": gates}, rule=LINEAR)
    torch.testing.assert_close(state.weights[0][0], a["weights"][0], rtol=1e-12, atol=1e-12)


def test_equal_keys_within_the_bound_stay_bounded():
    """θ < 2 (1 − η) / b for a chunk of one key."""
    T, b = 2048, 16
    k = torch.zeros(1, T, H, K, dtype=torch.float64)
    k[..., 0] = 1
    v = torch.randn(1, T, H, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones(1, T, H, dtype=torch.float64)
    weights = (torch.zeros(H, K, K, dtype=torch.float64),)
    sizes = []
    for factor in (0.9, 1.1):
        gates = Gates(0 * ones, factor * 2 / b * ones)
        o, _ = neural_memory(k, k, v, weights, gates, rule=Rule(chunk_size=b))
        sizes.append(o[:, -b:].abs().max())
    assert sizes[0] < 20 and sizes[1] > 1e6


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_random_keys_bear_steps_up_to_2_less_momentum(momentum):
    """θ < 2 (1 − η) online: far less than one repeated key bears, (2 − α)(1 + η)."""
    generator = torch.Generator().manual_seed(0)
    size = 1, 2048, H, 16
    k = torch.nn.functional.normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=-1)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    ones = torch.ones(size[:3], dtype=torch.float64)
    sizes = []
    for factor in (0.9, 1.3):
        gates = Gates(0 * ones, factor * 2 * (1 - momentum) * ones, ones.mul(momentum).log())
        _, state = neural_memory(k, k, v, (torch.zeros(H, 16, 16, dtype=torch.float64),), gates, rule=LINEAR)
        sizes.append(state.weights[0].norm())
    assert sizes[0] < 1e3 and sizes[1] > 1e6, sizes


@pytest.mark.parametrize("name", ["linear", "two layers with norm", "read the chunk's"])
def test_narrow_inputs_keep_a_wide_state(name):
    arguments, rule = variant(name, 2, 40)
    rule = replace(rule, chunk_size=8)

    def narrow(x):
        if x is None or isinstance(x, torch.Tensor):
            return None if x is None else x.detach()
        return type(x)(*map(narrow, x)) if isinstance(x, Gates) else tuple(map(narrow, x))

    wide = {n: narrow(x) for n, x in arguments.items()}
    rounded = {n: x.bfloat16() for n, x in wide.items() if n in "qkv"}
    expected, _ = neural_memory(**wide | {n: x.double() for n, x in rounded.items()}, rule=rule)
    o, state = neural_memory(**wide | rounded, rule=rule)
    assert o.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in leaves(state))
    assert (o.double() - expected).norm() < (0.03 if rule.read == "chunk" else 0.005) * expected.norm()


def test_reading_is_what_a_query_would_see():
    arguments, rule = variant("two layers with norm", 2, 9)
    rule = replace(rule, chunk_size=4)
    _, state = neural_memory(**arguments, rule=rule)
    q = arguments["q"][:, :1]
    got = read_memory(q, state, rule=rule, norm_weight=arguments["norm_weight"])
    still = Gates(*(torch.zeros_like(x[:, :1]) for x in arguments["gates"]))
    part = arguments | {n: arguments[n][:, :1] for n in "qkv"} | {"gates": still._replace(log_momentum=still.lr - 80)}
    expected, _ = neural_memory(**part, rule=rule, initial_state=state, position=torch.tensor([9, 9]))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# mistakes


@pytest.mark.parametrize("name", [name for name, (_, rule) in VARIANTS.items() if rule.window == 1])
def test_writing_leaves_what_a_loop_over_the_chunk_does(name):
    arguments, rule = variant(name, 1, 5)
    _, want = neural_memory(**arguments, rule=replace(rule, chunk_size=5), backend="reference")
    gates, weights = arguments["gates"], arguments["weights"]
    layers = tuple(gates for _ in weights) if isinstance(gates, Gates) else gates
    fresh = fresh_state(weights, 1, rule, layers[0].log_momentum is not None, arguments["v"].shape[-1])
    options = {name: arguments[name] for name in ("norm_weight", "delta")}
    got = write_memory(arguments["k"], arguments["v"], fresh, layers, rule=rule, **options)
    written = leaves({k: v for k, v in arguments.items() if k not in ("q", "gamma")})
    for tolerance, g, w in ((1e-12, got, want), (1e-10, *(gradients(state, written) for state in (got, want)))):
        assert_close(g, w, tolerance)


def gradients(state, inputs):
    loss = sum(
        (x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)).sum()
        for x in leaves(state)
    )
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def test_windows_are_not_written_alone():
    with pytest.raises(ValueError, match="windows and orthogonal updates need neural_memory"):
        write_memory(None, None, None, (), rule=Rule(window=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": Rule(chunk_size=0)}, "chunk_size=0"),
        ({"rule": Rule(newton_schulz=5)}, "needs read='chunk'"),
        ({"rule": Rule(retention="softmax")}, "needs read='chunk'"),
        ({"rule": Rule(bias="huber")}, "needs delta"),
        ({"rule": Rule(window=2)}, "needs gamma"),
        ({"rule": Rule(gated=True)}, "three matrices"),
        ({"gamma": torch.zeros(2, 5, H)}, "gamma is for"),
        ({"q": torch.zeros(2, 5, H)}, r"\(B, T, H, K\)"),
        ({"v": torch.zeros(2, 5, H, 3), "rule": MLP}, "residual=False"),
        ({"v": torch.zeros(2, 5, H, 3)}, r"weights\[0\]"),
        ({"position": torch.zeros(2)}, "give both"),
        ({"gates": (1, 2)}, "gates for each"),
        ({"keep": "none"}, "keep must be 'root' or 'all', got 'none'"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        neural_memory(**{**make(2, 5), "rule": LINEAR, **change})
