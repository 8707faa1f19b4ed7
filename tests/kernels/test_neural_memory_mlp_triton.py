"""The two-layer memory in Triton, run by its interpreter, against the token loop in float64; and compiled without a
GPU."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from compiling import SHARED_LIMIT, compile_for_hopper
from together import run_together
from torch.nn.functional import normalize

from riverrun.kernels.common import self_check
from riverrun.kernels.neural_memory import triton_mlp_launch
from riverrun.kernels.neural_memory.gates import triton_gates
from riverrun.kernels.neural_memory.reference import neural_memory_reference
from riverrun.kernels.neural_memory.rule import Gates, MemoryState, Rule
from riverrun.kernels.neural_memory.triton_mlp import mlp_memory_triton
from riverrun.kernels.neural_memory.triton_mlp_back import back_kernel
from riverrun.kernels.neural_memory.triton_mlp_launch import Launch, pack, unpack
from riverrun.kernels.neural_memory.triton_mlp_walk import again_kernel, walk_kernel


def make_inputs(B, T, H=1, K=32, F=32, V=32, S=None, momentum=True, norm=True, separate=False, dtype=torch.float32):
    """q, k, v; gates of one or both layers; W₁, W₂ and perhaps S₁, S₂; perhaps the norm's gain. Steps are so small that
    the memory's own dynamics do not magnify roundings, or else the token loop in float32 would be as far off."""
    q, k = (normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
    layers = []
    for _ in range(1 + separate):
        gates = [-0.01 * torch.rand(B, T, H), 0.03 * torch.rand(B, T, H), -torch.rand(B, T, H).exp()]
        layers.append(gates[: 2 + momentum])
    S = S or B
    weights = [torch.randn(S, H, K, F), torch.randn(S, H, F, V) * F**-0.5]
    weights += [0.3 * torch.randn_like(x) * x.abs().mean() for x in weights] * momentum
    gain = [1 + 0.2 * torch.randn(H, V)] * norm
    return [x.to(dtype) for x in (q, k, torch.randn(B, T, H, V))], layers, weights, gain


def run(inputs, rule, form, cu_seqlens, dtype=None):
    """o, the final state, and the gradients of all inputs."""
    tokens, layers, weights, gain = inputs
    tensors = (*tokens, *itertools.chain(*layers), *weights, *gain)
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in tensors]
    rest = list(leaves)

    def take(count):
        taken, rest[:] = rest[:count], rest[count:]
        return taken

    q, k, v = take(3)
    gates = [Gates(*take(len(layer))) for layer in layers]
    state = take(len(weights))
    o, *final = form(q, k, v, gates, state, rest[0] if gain else None, rule, cu_seqlens)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (o, *final)]
    return [o, *final, *torch.autograd.grad((o, *final), leaves, upstream)]


def reference(q, k, v, gates, state, gain, rule, cu_seqlens):
    weights, momentum = tuple(state[:2]), tuple(state[2:]) or None
    both = (gates[0], gates[-1])
    o, final = neural_memory_reference(
        q, k, v, MemoryState(weights, momentum, weights), both, rule, gain, None, None, None, cu_seqlens
    )
    return o, *final.weights, *(final.momentum or ())


def triton(q, k, v, gates, state, gain, rule, cu_seqlens, keep="root", max_seqlen=None):
    of_chunks = [triton_gates(layer, rule.chunk_size, cu_seqlens) for layer in gates]
    o, weights, momentum = mlp_memory_triton(
        q, k, v, (of_chunks[0], of_chunks[-1]), gain, tuple(state[:2]), tuple(state[2:]) or None, cu_seqlens,
        chunk_size=rule.chunk_size, activation=rule.activation, residual=rule.residual, read=rule.read, keep=keep,
        max_seqlen=max_seqlen,
    )  # fmt: skip
    return o, *weights, *(momentum or ())


def errors(inputs, bounds=None, **options):
    rule = Rule(**{"chunk_size": 16, "residual": True} | options)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    want = run(inputs, rule, reference, cu_seqlens, torch.float64)
    got = run(inputs, rule, triton, cu_seqlens)
    return [((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("T", [1, 15, 17, 32, 70, 150])
def test_equals_the_token_loop(T):
    """70 tokens are five chunks, in two groups; 150 are ten, in three."""
    assert max(errors(make_inputs(1, T))) < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
def test_networks(activation, norm, momentum):
    inputs = make_inputs(2, 20, momentum=momentum, norm=norm, separate=True)
    assert max(errors(inputs, activation=activation, residual=norm)) < 1e-5


@pytest.mark.parametrize("momentum", [True, False])
def test_reads_before_writing(momentum):
    assert max(errors(make_inputs(1, 36, H=2, momentum=momentum), read="before")) < 1e-5


@pytest.mark.parametrize("K, F, V", [(32, 32, 64), (96, 64, 32), (64, 128, 96), (32, 256, 32)])
def test_sizes(K, F, V):
    """Those that are padded, too."""
    assert max(errors(make_inputs(1, 20, K=K, F=F, V=V), residual=False)) < 1e-5


@pytest.mark.parametrize("F, S, bounds, keep", [(96, 1, None, "root"), (64, 3, [0, 1, 30, 50], "all")])
def test_teams(F, S, bounds, keep, monkeypatch):
    """Several tiles of hidden channels, whose programs meet; more heads than teams, and tokens that no program has."""
    run_together(monkeypatch, walk_kernel, again_kernel, back_kernel)
    monkeypatch.setattr(triton_mlp_launch, "ALONE", False)
    monkeypatch.setattr(triton_mlp_launch, "multiprocessors", lambda x: 2 * F // 32)
    inputs, rule = make_inputs(1, 50, H=3, F=F, S=S), Rule(chunk_size=16, residual=True)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    want = run(inputs, rule, reference, cu_seqlens, torch.float64)
    got = run(inputs, rule, partial(triton, keep=keep), cu_seqlens)
    assert max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.parametrize("chunk_size, T", [(32, 70), (64, 130)])
def test_longer_chunks(chunk_size, T):
    assert max(errors(make_inputs(1, T, F=64), chunk_size=chunk_size)) < 1e-5


@pytest.mark.parametrize("bounds", [[0, 1, 2, 35, 70], [0, 16, 17, 70], [0, 70]])
def test_documents(bounds):
    """Of one token, of whole chunks, and longer than a group."""
    assert max(errors(make_inputs(1, 70, S=len(bounds) - 1, separate=True), bounds)) < 1e-5
    assert max(errors(make_inputs(1, 70, S=len(bounds) - 1, momentum=False), bounds, read="before")) < 1e-5


def test_gradients_go_through_no_more_groups_than_the_longest_document_has():
    inputs, rule = make_inputs(1, 70, S=4), Rule(chunk_size=16, residual=True)
    bounds = torch.tensor([0, 1, 2, 37, 70])
    everything, told, too_few = (run(inputs, rule, partial(triton, max_seqlen=n), bounds) for n in (None, 35, 32))
    assert all(torch.equal(a, b) for a, b in zip(told, everything, strict=True))
    outputs, by_queries = 5, 5  # how many `run` returns first, and the place of what it returns next
    assert all(torch.equal(a, b) for a, b in zip(too_few[:outputs], everything, strict=False))
    assert not torch.equal(too_few[by_queries][:, 2:37], everything[by_queries][:, 2:37])
    assert torch.equal(too_few[by_queries][:, :2], everything[by_queries][:, :2])


@pytest.mark.parametrize(
    "T, options, rule, bounds",
    [
        (70, {}, {}, None),
        (150, {"B": 2, "H": 2, "K": 32, "F": 64, "V": 64, "norm": False}, {"residual": False}, None),
        (40, {"momentum": False, "separate": True}, {"activation": "silu", "read": "before"}, None),
        (130, {"F": 64, "dtype": torch.bfloat16}, {"chunk_size": 64}, None),
        (70, {"S": 4, "H": 2, "separate": True}, {}, [0, 1, 2, 35, 70]),
        (300, {"S": 3, "momentum": False, "norm": False, "F": 64}, {"chunk_size": 64}, [0, 64, 65, 300]),
    ],
)
def test_the_states_of_all_chunks_are_those_that_are_made_again(T, options, rule, bounds):
    """To the last bit, and so are all gradients."""
    inputs = make_inputs(**{"B": 1, "T": T} | options)
    rule, bounds = Rule(**{"chunk_size": 16, "residual": True} | rule), None if bounds is None else torch.tensor(bounds)
    root, every = (run(inputs, rule, partial(triton, keep=keep), bounds) for keep in ("root", "all"))
    assert all(torch.equal(a, b) for a, b in zip(every, root, strict=True))


@pytest.mark.parametrize("bounds", [None, [0, 1, 2, 35, 70]])
def test_all_states_are_kept_once_and_none_is_made_again(bounds, monkeypatch):
    """Of every chunk, however many documents there are; and nothing without gradients."""
    started, saved, to_save = [], [], Launch.to_save

    def noted(method):
        def start(launch, kernel, *rest, **options):
            started.append(kernel.__name__)
            return method(launch, kernel, *rest, **options)

        return start

    def room(launch, *rest):
        saved.append(to_save(launch, *rest))
        return saved[-1]

    for name in ("of_teams", "of_group"):
        monkeypatch.setattr(Launch, name, noted(getattr(Launch, name)))
    monkeypatch.setattr(Launch, "to_save", room)
    inputs = make_inputs(1, 70, S=4 if bounds else 1, dtype=torch.bfloat16)
    cu_seqlens = torch.tensor(bounds) if bounds else None
    run(inputs, Rule(chunk_size=16, residual=True), partial(triton, keep="all"), cu_seqlens)
    kernels = "walk", "before", "back", "after"
    assert started == [f"{name}_kernel" for name in kernels]
    before_norm, states, u, d2 = saved.pop()
    chunks = 70 // 16 + (4 if bounds else 1)  # a short one of each row or, maybe, document
    assert before_norm.shape == (1, 70, 1, 32)
    assert states.shape == (chunks, 1, 2, 32 * (32 + 32)) and u.shape == d2.shape == (chunks, 1, 16, 32)
    assert (states.dtype, u.dtype, d2.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    (q, k, v), layers, weights, gain = inputs
    triton(q, k, v, [Gates(*layers[0])], weights, gain[0], Rule(chunk_size=16), cu_seqlens, keep="all")
    assert not any(x.numel() for x in saved.pop())


@pytest.mark.parametrize("bounds", [[0, 70], [0, 16, 70], [0, 5, 6, 70], list(range(0, 71, 2))])
def test_every_group_has_a_checkpoint_of_its_own(bounds):
    x, weight, state = torch.zeros(1, 70, 1, 32), torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 2, 2048)
    launch = Launch.of(x, x, weight, None, state, torch.tensor(bounds), False, False, "root", 70)
    places, c = [], 0
    for start, end in itertools.pairwise(bounds):
        chunks = -(-(end - start) // 16)
        places += [c // launch.keep + group - 1 for group in range(1, -(-chunks // launch.keep))]
        c += chunks
    assert len(set(places)) == len(places)
    assert max(places, default=-1) < launch.num_checkpoints


def test_extreme_gates():
    """All forgotten at once, a momentum that stays, and no steps."""
    for log_keep, log_momentum, lr in ((-20.0, -1e-4, 0.02), (-1e-3, -30.0, 0.1), (-0.1, -1.0, 0.0)):
        inputs = make_inputs(1, 40, norm=False)
        gates = (log_keep, lr, log_momentum)
        inputs[1][0] = [torch.full_like(x, value) for x, value in zip(inputs[1][0], gates)]
        assert max(errors(inputs)) < 2e-5


def test_half_precision():
    """In products; the interpreter cuts numbers to bfloat16 instead of rounding them."""
    assert max(errors(make_inputs(1, 40, F=64, dtype=torch.bfloat16))) < 3e-2


def test_only_what_is_asked_for():
    """A loss of o alone, or of a final weight alone; nothing kept without gradients; no initial momentum."""
    (q, k, v), layers, weights, gain = make_inputs(1, 20)
    rule, still = Rule(chunk_size=16), [torch.zeros_like(x) for x in weights[:2]]
    for which in (0, 2):
        grads = []
        for form, dtype in ((triton, torch.float32), (reference, torch.float64)):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, *layers[0], *weights[:2], *gain)]
            state = leaves[6:8] + ([] if form is triton else [x.to(dtype) for x in still])
            loss = form(*leaves[:3], [Gates(*leaves[3:6])], state, leaves[-1], rule, None)[which].square().sum()
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        assert max((got - want).norm() / want.norm().clamp_min(1e-9) for got, want in zip(*grads)) < 1e-5
    with torch.no_grad():
        o = triton(q, k, v, [Gates(*layers[0])], weights, gain[0], rule, None)[0]
    want = reference(q, k, v, [Gates(*layers[0])], weights, gain[0], rule, None)[0]
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", ["root", "all"])
def test_under_torch_compile(keep):
    """Nothing breaks the graph, and gradients are the same."""
    (q, k, v), layers, weights, gain = make_inputs(1, 40)
    leaves = [x.requires_grad_() for x in (q, k, v, *layers[0], *weights, *gain)]

    def loss(q, k, v, log_keep, lr, log_momentum, *rest):
        gates, rule = [Gates(log_keep, lr, log_momentum)], Rule(chunk_size=16)
        outputs = triton(q, k, v, gates, rest[:4], rest[4], rule, None, keep)
        return sum(x.square().sum() for x in outputs)

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_state_is_packed_and_unpacked():
    layers = torch.randn(2, 3, 32, 64), torch.randn(2, 3, 64, 96)
    (weights, momentum) = unpack(pack(layers, None, 2), 32, 96)
    assert all(torch.equal(a, b) for a, b in zip(weights, layers))
    assert not any(x.any() for x in momentum)


@pytest.mark.parametrize("keep", ["root", "all"])
@pytest.mark.parametrize("packed, momentum, norm", [(False, True, True), (True, False, False)])
def test_checks_itself(packed, momentum, norm, keep, tmp_path, monkeypatch):
    """As it would on a GPU, in the form that is used, and refuses kernels that are wrong."""
    monkeypatch.setattr(self_check, "INTERPRETED_TOO", True)
    monkeypatch.setattr(self_check, "_folder", lambda: tmp_path)
    monkeypatch.setattr(self_check, "_agreed", set())
    bounds = torch.tensor([0, 5, 20]) if packed else None
    inputs = make_inputs(1, 20, S=2 if packed else 1, momentum=momentum, norm=norm)
    run(inputs, Rule(chunk_size=16, residual=norm), partial(triton, keep=keep), bounds)
    cases = [file.read_text() for file in tmp_path.glob("*.json")]
    assert len(cases) == 2 and all(f"states={keep}" in case for case in cases)

    from riverrun.kernels.neural_memory import triton_mlp

    walk_back = triton_mlp.walk_back
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "_folder", lambda: tmp_path / "other")
    monkeypatch.setattr(triton_mlp, "walk_back", lambda *inputs: [1.01 * x for x in walk_back(*inputs)])
    with pytest.raises(RuntimeError, match=r"neural_memory_mlp with .* gradients=True.*: on this machine"):
        run(inputs, Rule(chunk_size=16, residual=norm), partial(triton, keep=keep), bounds)


def test_user_errors():
    (q, k, v), layers, weights, _ = make_inputs(2, 4)
    rule, gates = Rule(chunk_size=16), [Gates(*layers[0])]
    with pytest.raises(ValueError, match="take chunks of 16, 32 or 64, got 8"):
        triton(q, k, v, gates, weights, None, Rule(chunk_size=8), None)
    with pytest.raises(ValueError, match="a multiple of 32 up to 1024 hidden channels, got K=32, V=32 and 48"):
        triton(q, k, v, gates, [torch.zeros(2, 1, 32, 48), torch.zeros(2, 1, 48, 32)], None, rule, None)
    with pytest.raises(ValueError, match="interpreter runs two-layer memories with a power of 2"):
        triton(q, k, v, gates, [torch.zeros(2, 1, 32, 96), torch.zeros(2, 1, 96, 32)], None, rule, None)
    with pytest.raises(ValueError, match="one row: expected batch size 1, got 2"):
        mlp_memory_triton(
            q, k, v, (triton_gates(gates[0], 16, None),) * 2, None, tuple(weights[:2]), None, torch.tensor([0, 8]),
            chunk_size=16, activation="gelu", residual=True, read="after",
        )  # fmt: skip


def test_compiles_for_hopper():
    kernels = compile_for_hopper(Path(__file__).with_name("launches_neural_memory_mlp.py"))
    # a program of a team has a multiprocessor for itself, and half of its registers are the state's
    spills = {"walk_kernel": 192, "back_kernel": 400, "before_kernel": 320, "after_kernel": 128, "again_kernel": 0}
    assert {kernel["kernel"] for kernel in kernels} == {*spills, "output_gradients_kernel"}
    short = "launch_short_chunks_packed", "launch_short_chunks_packed_all_states", "launch_padded_heads"
    for kernel in kernels:
        of_team, launch = kernel["kernel"] in ("walk_kernel", "back_kernel", "again_kernel"), kernel["launch"]
        assert (1 if of_team else 2) * kernel["shared"] <= SHARED_LIMIT, kernel
        if launch != "launch_single_precision":
            assert kernel["stack"] <= spills.get(kernel["kernel"], 0), f"spills: {kernel}"
            # chunks of fewer than 64 tokens, as rows of what is summed, are too few for it
            rows = kernel["kernel"] == "output_gradients_kernel" or (launch in short and not of_team)
            assert kernel["wgmma"] > 0 or rows, kernel
