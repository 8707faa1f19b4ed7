"""The Triton kernels of a linear neural memory, run by the interpreter, against loops in float64; and compiled without
a GPU."""

import itertools
from pathlib import Path

import pytest
import torch
from compiling import SHARED_LIMIT, SHARED_LIMIT_OF_AMPERE, compile_for_ampere, compile_for_hopper
from torch.nn import functional as F

from riverrun.kernels.common import self_check
from riverrun.kernels.common.triton_chunks import cut
from riverrun.kernels.neural_memory import triton_linear_op
from riverrun.kernels.neural_memory.gates import ChunkGates, triton_gates
from riverrun.kernels.neural_memory.rule import Gates
from riverrun.kernels.neural_memory.triton_linear_launch import Launch
from riverrun.kernels.neural_memory.triton_linear_op import linear_memory_triton

NAMES = "q", "k", "v", "log_keep", "lr", "log_momentum", "initial", "initial_momentum"


def make_inputs(T, B=1, H=2, K=16, V=16, S=None, momentum=True, still=False, dtype=torch.float32):
    """By the names above; None for what there is not."""
    q, k = (F.normalize(torch.randn(B, T, H, K), dim=-1).to(dtype) for _ in range(2))
    log_keep, log_momentum = -torch.rand(2, B, T, H)
    W, M = torch.randn(2, S or B, H, K, V)
    inputs = [q, k, torch.randn(B, T, H, V).to(dtype), log_keep, 0.5 * torch.rand(B, T, H)]
    return [*inputs, log_momentum if momentum else None, W, M if momentum and not still else None]


def by_tokens(q, k, v, log_keep, lr, log_momentum, W, S, *, chunk_size, online, read, bounds):
    """The rule itself, token after token → o, final weights, final momentum."""
    q, k, v, log_keep, lr = (x.flatten(0, 1) for x in (q, k, v, log_keep, lr))
    momentum = None if log_momentum is None else log_momentum.flatten(0, 1).exp()
    S = torch.zeros_like(W) if S is None else S
    outputs, ends = [], []
    for s, (begin, end) in enumerate(itertools.pairwise(bounds)):
        weights, velocity, anchor = W[s], S[s], W[s]
        for t in range(begin, end):
            if online or (t - begin) % chunk_size == 0:
                anchor = weights
            if read == "before":
                outputs.append(torch.einsum("hk,hkv->hv", q[t], weights))
            error = torch.einsum("hk,hkv->hv", k[t], anchor) - v[t]
            step = -lr[t][:, None, None] * k[t][:, :, None] * error[:, None]
            velocity = step if momentum is None else momentum[t][:, None, None] * velocity + step
            weights = log_keep[t].exp()[:, None, None] * weights + velocity
            if read == "after":
                outputs.append(torch.einsum("hk,hkv->hv", q[t], weights))
        ends.append((weights, velocity))
    finals = [torch.stack(x) for x in zip(*ends)]
    return torch.stack(outputs), *(finals if momentum is not None else finals[:1])


def by_triton(q, k, v, log_keep, lr, log_momentum, W, S, *, chunk_size, online, read, bounds, keep="root"):
    cu_seqlens = torch.tensor(bounds) if len(q) == 1 else None
    gates = triton_gates(Gates(log_keep, lr, log_momentum), chunk_size, cu_seqlens)
    options = {"chunk_size": chunk_size, "online": online, "read": read, "keep": keep}
    o, *finals = linear_memory_triton(q, k, v, gates, W, S, cu_seqlens, **options)
    assert o.dtype == q.dtype and finals[0].dtype == torch.float32
    return o.flatten(0, 1), *(x for x in finals if x is not None)


def run(function, inputs, dtype=None, **options):
    """The outputs, and the gradients of all inputs through all of them."""
    leaves = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    outputs = function(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [x for x in leaves if x is not None], upstream)]


def distance(got, want):
    pairs = zip(got, want, strict=True)
    return max(((a - b).norm() / b.norm().clamp_min(1e-9)).item() for a, b in pairs)


def error(inputs, chunk_size=16, online=True, read="after", bounds=None, keep="root"):
    B, T = inputs[0].shape[:2]
    bounds = [T * b for b in range(B + 1)] if bounds is None else bounds
    options = {"chunk_size": chunk_size, "online": online, "read": read, "bounds": bounds}
    return distance(run(by_triton, inputs, **options, keep=keep), run(by_tokens, inputs, torch.float64, **options))


RULES = [(online, read, momentum) for online in (True, False) for read in ("after", "before") for momentum in (1, 0)]


@pytest.mark.parametrize("online, read, momentum", RULES)
@pytest.mark.parametrize("T", [1, 9, 17, 40])
def test_equals_the_token_loop(online, read, momentum, T):
    """One token; fewer than a chunk; one more; ragged."""
    assert error(make_inputs(T, B=2, H=1, momentum=momentum), online=online, read=read) < 1e-5
    assert error(make_inputs(T, H=2, momentum=momentum, still=True), online=online, read=read) < 1e-5


@pytest.mark.parametrize("online, read, momentum", RULES)
@pytest.mark.parametrize("bounds", [[0, 1, 2, 19, 40], [0, 16, 17, 40], [0, 39, 40], [0, 40]])
def test_documents(online, read, momentum, bounds):
    inputs = make_inputs(40, H=1, S=len(bounds) - 1, momentum=momentum)
    assert error(inputs, online=online, read=read, bounds=bounds) < 1e-5


@pytest.mark.parametrize("chunk_size, T", [(32, 50), (64, 70), (128, 150)])
@pytest.mark.parametrize("online, read", [(True, "after"), (False, "before")])
def test_chunk_sizes(chunk_size, T, online, read):
    assert error(make_inputs(T, H=1), chunk_size, online, read) < 1e-5


@pytest.mark.parametrize("K, V", [(32, 48), (96, 16), (16, 96), (20, 33), (130, 17), (192, 80)])
@pytest.mark.parametrize("online, momentum", [(True, True), (False, False)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 3e-3)])
def test_head_sizes(K, V, online, momentum, dtype, tolerance):
    """Tiles that divide, and tiles that are padded; several of keys' and of values' channels, or all of the values'."""
    assert error(make_inputs(20, H=1, K=K, V=V, momentum=momentum, dtype=dtype), online=online) < tolerance


@pytest.mark.parametrize("name, value", [("log_keep", -20.0), ("log_keep", 0.0), ("log_momentum", -1e-6), ("lr", 0.0)])
@pytest.mark.parametrize("online, read", [(True, "after"), (True, "before"), (False, "after")])
def test_extreme_gates(name, value, online, read):
    inputs = make_inputs(40, H=1)
    inputs[NAMES.index(name)].fill_(value)
    assert error(inputs, online=online, read=read) < 1e-5
    inputs[NAMES.index(name)][:, ::3] = -1.0 if value else 0.3  # and beside others
    assert error(inputs, online=online, read=read) < 1e-5


def test_repeated_keys():
    """Steps of full size along one direction: powers of the triangular matrix, which nobody takes, would be large."""
    inputs = make_inputs(70, H=1, momentum=False)
    inputs[1][:] = inputs[1][:, :1]
    inputs[3].zero_()
    inputs[4].fill_(1.9)
    assert error(inputs, 64) < 1e-4


def by_chunks(q, k, v, decay, weight, carry, momentum_decay, momentum_weight, W, S, *, chunk_size, online, read):
    """The chunk form of one sequence, of gates that no tokens' gates need have made."""
    T, outputs = q.shape[1], []
    W, S = W[0], S[0]
    for c, start in enumerate(range(0, T, chunk_size)):
        x, y, z = (F.pad(a[0, start : start + chunk_size].transpose(0, 1), (0, 0, 0, chunk_size)) for a in (q, k, v))
        x, y, z = (a[:, :chunk_size] for a in (x, y, z))  # (H, C, …), zeros at padding
        now = decay[c][..., None], carry[c][..., None], weight[c]
        late = [F.pad(a[:, :-1], (0, 0, 1, 0)) for a in now]
        late[0] = torch.cat([torch.ones_like(now[0][:, :1]), now[0][:, :-1]], 1)
        E = y @ W - z
        if online:
            A = torch.tril(late[2] * (y @ y.mT), -1)
            right = late[0] * (y @ W) + late[1] * (y @ S) - z
            E = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
        at = late if read == "before" else now
        outputs.append((at[0] * (x @ W) + at[1] * (x @ S) - (at[2] * (x @ y.mT)) @ E).transpose(0, 1))
        written, into = ((g[..., None] * y).mT @ E for g in (weight[c, :, -1], momentum_weight[c]))
        W = now[0][:, -1:] * W + now[1][:, -1:] * S - written
        S = momentum_decay[c][:, None, None] * S - into
    return torch.cat(outputs)[:T], W[None], S[None]


def chunks_by_triton(q, k, v, *rest, **options):
    o, *finals = linear_memory_triton(q, k, v, ChunkGates(*rest[:5]), *rest[5:], None, **options)
    return o[0], *finals


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("read", ["after", "before"])
def test_every_gradient_of_the_gates(online, read):
    T, H, C = 40, 2, 16
    inputs = make_inputs(T, H=H)
    M, valid = cut(inputs[0], C, None).num_chunks, torch.ones(1, 1, C)
    weight = torch.rand(M, H, C, C).tril() / 4
    weight[-1, :, :, T % C :] = 0
    gates = torch.rand(M, H, C), weight, torch.rand(M, H, C) * valid, torch.rand(M, H), torch.rand(M, H, C)
    gates[4][-1, :, T % C :] = 0
    leaves, options = [*inputs[:3], *gates, *inputs[6:]], {"chunk_size": C, "online": online, "read": read}
    got, want = run(chunks_by_triton, leaves, **options), run(by_chunks, leaves, torch.float64, **options)
    lower = torch.ones(C, C).tril()  # above the diagonal nothing is read
    got[7], want[7] = got[7] * lower, want[7] * lower
    assert distance(got, want) < 1e-5


def test_chunks_too_many_have_no_gradients():
    """Of packed documents there may be fewer chunks than the gates have room for."""
    inputs = make_inputs(48, H=1)
    cu_seqlens = torch.tensor([0, 16, 48])
    gates = triton_gates(Gates(*inputs[3:6]), 16, cu_seqlens)
    leaves = [x.detach().requires_grad_() for x in gates]
    states = torch.randn(2, 2, 1, 16, 16)
    options = {"chunk_size": 16, "online": True, "read": "after"}
    o, *_ = linear_memory_triton(*inputs[:3], ChunkGates(*leaves), *states, cu_seqlens, **options)
    assert len(gates.decay) == 5
    for grad in torch.autograd.grad(o.sum(), leaves):
        assert grad[:3].abs().sum() > 0 and not grad[3:].any()


@pytest.mark.parametrize("momentum", [True, False])
def test_only_what_is_asked_for(momentum):
    """A loss of one output alone."""
    inputs = make_inputs(20, momentum=momentum)
    options = {"chunk_size": 16, "online": True, "read": "after", "bounds": [0, 20]}
    for which in range(3 if momentum else 2):
        grads = []
        for function, dtype in ((by_triton, torch.float32), (by_tokens, torch.float64)):
            leaves = [x if x is None else x.to(dtype).requires_grad_() for x in inputs]
            loss, leaves = function(*leaves, **options)[which].square().sum(), [x for x in leaves if x is not None]
            grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
        for got, want in zip(*grads):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("online, read, momentum", RULES)
def test_narrow_types(online, read, momentum):
    assert error(make_inputs(40, momentum=momentum, dtype=torch.bfloat16), online=online, read=read) < 5e-2
    assert error(make_inputs(40, momentum=momentum, dtype=torch.float16), online=online, read=read) < 3e-3


@pytest.mark.parametrize("online, read, momentum", RULES)
@pytest.mark.parametrize("bounds", [[0, 40], [0, 1, 2, 19, 40]])
def test_what_is_saved_is_what_is_made_again(online, read, momentum, bounds):
    """To the last bit, and so are all gradients."""
    inputs = make_inputs(40, S=len(bounds) - 1, momentum=momentum, dtype=torch.bfloat16)
    options = {"chunk_size": 16, "online": online, "read": read, "bounds": bounds}
    again, saved = (run(by_triton, inputs, **options, keep=keep) for keep in ("root", "all"))
    assert all(torch.equal(a, b) for a, b in zip(saved, again, strict=True))


def test_all_is_saved_once_and_nothing_is_made_again(monkeypatch):
    started = []
    for name in ("prepare", "outputs", "states"):
        method = getattr(Launch, name)
        monkeypatch.setattr(Launch, name, lambda *x, name=name, method=method: [started.append(name), method(*x)][1])
    inputs, options = make_inputs(40), {"chunk_size": 16, "online": True, "read": "after", "bounds": [0, 40]}
    run(by_triton, inputs, **options, keep="all")
    assert started == ["prepare", "outputs"]
    started.clear()
    run(by_triton, inputs, **options)
    assert started == ["prepare", "outputs", "prepare", "states"]
    saved = []
    room = Launch.room
    monkeypatch.setattr(Launch, "room", lambda launch, save: saved.append(save) or room(launch, save))
    by_triton(*inputs, **options, keep="all")
    assert saved == [False]  # there are no gradients to be taken


def test_compiled_by_torch():
    """As an operator that torch.compile does not look into, with the shapes that it says it has."""
    inputs = make_inputs(20, H=1)
    bounds = torch.tensor([0, 20])
    gates = tuple(x.contiguous() for x in triton_gates(Gates(*inputs[3:6]), 16, bounds))
    arguments = [x.requires_grad_() for x in (*inputs[:3], *gates, *inputs[6:])]
    arguments += [bounds, 16, True, False, True]
    torch.library.opcheck(triton_linear_op._forward.overload, arguments, test_utils=("test_schema", "test_faketensor"))
    still = [x for i, x in enumerate(arguments) if i not in (5, 6, 7, 9)]
    still[5:5] = [None] * 3
    still[9:9] = [None]
    torch.library.opcheck(triton_linear_op._forward.overload, still, test_utils=("test_schema", "test_faketensor"))
    for some in (arguments, still, [*arguments[:-1], False], [*arguments[:-3], False, False, True]):
        o, final, final_momentum, *saved = (x.detach() for x in triton_linear_op._forward(*some))
        grads = [o, final, final_momentum if final_momentum.numel() else None]
        checked = ("test_schema", "test_faketensor")
        arguments = [*grads, *some[:-4], *saved, *some[-4:-1]]
        torch.library.opcheck(triton_linear_op._backward.overload, arguments, test_utils=checked)


def test_checks_itself(monkeypatch, tmp_path):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "INTERPRETED_TOO", True)
    cases = [
        (make_inputs(20, H=1), {}),
        (make_inputs(20, H=1, S=2, still=True), {"read": "before", "bounds": [0, 3, 20]}),
        (make_inputs(20, H=1, momentum=False), {"online": False}),
        (make_inputs(20, H=1), {"keep": "all"}),
    ]
    for i, (inputs, options) in enumerate(cases):
        assert error(inputs, **options) < 1e-5
        assert len(list(tmp_path.rglob("*.json"))) == 2 * (i + 1)  # forwards and backwards
    monkeypatch.setattr(self_check, "_agreed", set())
    monkeypatch.setattr(self_check, "_sources", lambda: "edited")
    right = triton_linear_op.memory_backward
    monkeypatch.setattr(triton_linear_op, "memory_backward", lambda *x: (*right(*x)[:2], x[0], *right(*x)[3:]))
    with pytest.raises(RuntimeError, match=r"linear neural_memory with H=1, K=16.*gradients=True.*differ"):
        error(cases[0][0])


def test_user_errors():
    inputs = make_inputs(4, B=2, H=1)
    gates = triton_gates(Gates(*inputs[3:6]), 16, None)
    with pytest.raises(ValueError, match="one row: expected batch size 1, got 2"):
        linear_memory_triton(
            *inputs[:3], gates, *inputs[6:], torch.tensor([0, 4]), chunk_size=16, online=True, read="after"
        )


def test_compiles_for_hopper():
    kernels = compile_for_hopper(Path(__file__).with_name("launches_neural_memory_linear.py"))
    names = ("prepare", "forward", "backward", "within", "gradients")
    assert {k["kernel"] for k in kernels} == {f"{name}_kernel" for name in names}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT and kernel["wgmma"] > 0, kernel
        if kernel["launch"] == "launch_single_precision":
            continue  # whose products are three of narrower numbers
        assert kernel["stack"] <= (128 if kernel["launch"] == "launch_long_chunks" else 0), f"spills: {kernel}"
        if kernel["launch"] in ("launch_titans", "launch_anchored"):  # two programs fit a multiprocessor
            assert kernel["registers"] <= 256 and kernel["shared"] <= SHARED_LIMIT // 2 - 512, kernel


def test_compiles_for_ampere():
    for kernel in compile_for_ampere(Path(__file__).with_name("launches_neural_memory_linear.py")):
        assert kernel["shared"] <= SHARED_LIMIT_OF_AMPERE, kernel
