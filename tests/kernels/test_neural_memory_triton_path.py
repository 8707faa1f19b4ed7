"""neural_memory by way of its Triton kernels, run by the interpreter: what they take, and what they leave to torch."""

from dataclasses import replace

import pytest
import torch

from riverrun.kernels.neural_memory import Gates, Rule, fresh_state, neural_memory, write_memory
from tests.kernels.test_neural_memory import assert_close, bounds_of, gradients, leaves

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, K, F = 2, 64, 128
RULES = {
    "linear, online": (1, Rule()),
    "linear, read before": (1, Rule(chunk_size=16, read="before")),
    "two layers": (2, Rule(chunk_size=16, residual=True)),
}


def make(name, B, T, norm=True, momentum=True):
    layers, rule = RULES[name]
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator).to(DEVICE)

    q, k = (torch.nn.functional.normalize(randn(B, T, H, K), dim=-1) for _ in range(2))
    gates = Gates(
        -randn(B, T, H).abs() / 50, randn(B, T, H).sigmoid() / 16, -randn(B, T, H).abs() if momentum else None
    )
    sizes = [(K, K)] if layers == 1 else [(K, F), (F, K)]
    arguments = {
        "q": q, "k": k, "v": randn(B, T, H, K), "weights": tuple(randn(H, *s) / s[0] ** 0.5 for s in sizes),
        "gates": gates, "norm_weight": 1 + randn(H, K) / 10 if norm and layers > 1 else None,
    }  # fmt: skip
    for leaf in leaves(arguments):
        leaf.requires_grad_()
    return arguments, rule


def run(arguments, backend, **options):
    o, state = neural_memory(**arguments, backend=backend, **options)
    loss = (o * torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape)).sum()
    return o, state, torch.autograd.grad(loss, leaves(arguments))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("T", [5, 32, 37])
def test_triton_and_chunks_agree(name, T):
    arguments, rule = make(name, 2, T)
    for tolerance, got, want in zip(
        (1e-5, 1e-5, 1e-4), run(arguments, "triton", rule=rule), run(arguments, "chunked", rule=rule)
    ):
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("name", [name for name, (_, rule) in RULES.items() if rule.chunk_size > 1])
def test_tokens_that_nobody_reads(name):
    arguments, rule = make(name, 1, 5)
    written = leaves({name: x for name, x in arguments.items() if name != "q"})
    gates, weights = (arguments["gates"],) * RULES[name][0], arguments["weights"]
    fresh, found = fresh_state(weights, 1, rule, True, K), []
    for backend in ("triton", "chunked"):
        state = write_memory(
            arguments["k"], arguments["v"], fresh, gates, rule=rule, norm_weight=arguments["norm_weight"],
            backend=backend,
        )  # fmt: skip
        found.append((state, gradients(state, written)))
    for tolerance, got, want in zip((1e-5, 1e-4), *found):
        assert_close(got, want, tolerance)
    with pytest.raises(ValueError, match="there is no Triton kernel"):
        write_memory(**{n: arguments[n] for n in "kv"}, state=fresh, gates=gates, rule=replace(rule, chunk_size=4),
                     backend="triton")  # fmt: skip


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("T", [2, 5, 17])
def test_online_memories_are_written_by_a_chunk_of_any_size(T, momentum):
    arguments, rule = make("linear, online", 1, T, momentum=momentum)
    written = leaves({name: x for name, x in arguments.items() if name != "q"})
    gates, fresh = (arguments["gates"],), fresh_state(arguments["weights"], 1, rule, momentum, K)
    given = {"state": fresh, "gates": gates, "rule": rule}
    found = []
    for backend in ("triton", "chunked"):
        state = write_memory(arguments["k"], arguments["v"], **given, backend=backend)
        found.append((state, gradients(state, written)))
    for tolerance, got, want in zip((1e-5, 1e-4), *found):
        assert_close(got, want, tolerance)


def test_more_tokens_than_any_chunk_has_are_not_written_by_kernels():
    arguments, rule = make("linear, online", 1, 129)
    fresh = fresh_state(arguments["weights"], 1, rule, True, K)
    with pytest.raises(ValueError, match="there is no Triton kernel"):
        write_memory(
            arguments["k"], arguments["v"], fresh, (arguments["gates"],), rule=rule, backend="triton"
        )  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_what_is_left_can_be_gone_on_with(name):
    """Also where the kernels' sequences end within a chunk, whose start they do not tell."""
    arguments, rule = make(name, 2, 50)
    with torch.no_grad():
        whole, last = neural_memory(**arguments, rule=rule, backend="chunked")
        first, rest = (
            {n: x if n in ("weights", "norm_weight") else cut(x, part) for n, x in arguments.items()}
            for part in (slice(37), slice(37, None))
        )
        o, state = neural_memory(**first, rule=rule, backend="triton")
        place = torch.full((2,), 37, device=DEVICE)
        more, state = neural_memory(**rest, rule=rule, initial_state=state, position=place)
    assert_close(torch.cat([o, more], 1), whole, 1e-5)
    assert_close(state, last, 1e-5)


def cut(x, part):
    return x.each(lambda t: t[:, part]) if isinstance(x, Gates) else x[:, part]


@pytest.mark.parametrize("name", RULES)
def test_packed_documents(name):
    arguments, rule = make(name, 1, 60, momentum=False)
    rule = replace(rule, chunk_size=32) if name == "two layers" else rule
    bounds = bounds_of([1, 20, 33, 6]).to(DEVICE)
    options = {"rule": rule, "cu_seqlens": bounds}
    want, got = run(arguments, "chunked", **options), run(arguments, "triton", **options, resumable=False)
    for tolerance, g, w in zip(
        (1e-5, 1e-5, 1e-4), (got[0], got[1].weights, got[2]), (want[0], want[1].weights, want[2])
    ):
        assert_close(g, w, tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_states_that_are_kept_change_nothing_else(name, backend, monkeypatch):
    """Of a row that ends within a chunk, whose last tokens torch has; and only two layers' kernels are told."""
    from riverrun.kernels.neural_memory import triton_mlp

    told, form = [], triton_mlp.mlp_memory_triton

    def listen(*inputs, keep, **options):
        told.append(keep)
        return form(*inputs, keep=keep, **options)

    monkeypatch.setattr(triton_mlp, "mlp_memory_triton", listen)
    arguments, rule = make(name, 2, 37)
    root, every = (run(arguments, backend, rule=rule, keep=keep) for keep in ("root", "all"))
    assert all(torch.equal(a, b) for a, b in zip(leaves(every), leaves(root), strict=True))
    assert told == (["root", "all"] if (name, backend) == ("two layers", "triton") else [])


def test_what_has_no_kernel_is_refused():
    arguments, rule = make("two layers", 1, 20)
    for change in ({"bias": "lp"}, {"chunk_size": 128}, {"read": "chunk"}):
        with pytest.raises(ValueError, match="there is no Triton kernel"):
            neural_memory(**arguments, rule=replace(rule, **change), backend="triton")
    for options in ({"cu_seqlens": bounds_of([7, 13])}, {"initial_state": 0, "position": 0}):
        state, place = options.pop("initial_state", None), options.pop("position", None)
        if state is not None:
            _, state = neural_memory(**arguments, rule=rule)
            place = torch.tensor([20])
        with pytest.raises(ValueError, match="there is no Triton kernel"):
            neural_memory(**arguments, rule=rule, initial_state=state, position=place, backend="triton", **options)
