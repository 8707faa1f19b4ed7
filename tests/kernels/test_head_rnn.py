"""head_rnn: the step loop against torch's own cells and against scalars, the other backends against the step loop."""

import math
from pathlib import Path

import pytest
import torch
from compiling import CARDS

from riverrun.kernels.head_rnn import head_rnn
from riverrun.kernels.head_rnn.cells import CELLS

every_cell = pytest.mark.parametrize("cell", CELLS)
DOCUMENTS = [1, 5, 3, 1, 9]


def make_inputs(cell, B, T, H, K, S=None, gate_scale=1.0, dtype=torch.float64):
    """gates, weight, initial_state."""
    G, NS = len(CELLS[cell].gates), len(CELLS[cell].states)
    state = torch.randn(S or B, NS, H, K)
    if cell == "slstm":
        state[:, 1] = state[:, 1].abs() + 0.5  # a normaliser is positive; where it is below 1, its floor matters
    inputs = [torch.randn(B, T, G, H, K) * gate_scale, torch.randn(G, H, K, K) / math.sqrt(K), state]
    return [x.to(dtype).requires_grad_() for x in inputs]


def run(cell, inputs, use_state=True, **options):
    gates, weight, state = inputs
    h, final = head_rnn(gates, weight, cell, initial_state=state if use_state else None, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (h, final)]
    return [h, final, *torch.autograd.grad((h, final), inputs if use_state else inputs[:2], upstream)]


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_lstm_is_that_of_torch():
    K = 6
    gates, weight, state = (x.detach() for x in make_inputs("lstm", 2, 5, 1, K))
    cell = torch.nn.LSTMCell(4 * K, K, bias=False, dtype=torch.float64)  # gates in the order i, f, z, o
    cell.weight_ih.data = torch.eye(4 * K, dtype=torch.float64)
    cell.weight_hh.data = weight[:, 0].transpose(1, 2).flatten(0, 1)
    (c, h), want = state[:, :, 0].unbind(1), []
    for u in gates.flatten(2).unbind(1):
        h, c = cell(u, (h, c))
        want.append(h)
    out, final = head_rnn(gates, weight, "lstm", initial_state=state, backend="reference")
    torch.testing.assert_close((out[:, :, 0], final[:, :, 0]), (torch.stack(want, 1), torch.stack([c, h], 1)))


def test_gru_and_elman_are_those_of_torch():
    K = 6
    gates, weight, state = (x.detach() for x in make_inputs("gru", 2, 5, 1, K))
    gru = torch.nn.GRUCell(3 * K, K, bias=False, dtype=torch.float64)  # gates in the order r, z, n
    gru.weight_ih.data = torch.eye(3 * K, dtype=torch.float64)
    gru.weight_hh.data = weight[:, 0].transpose(1, 2).flatten(0, 1)
    elman = torch.nn.RNNCell(K, K, bias=False, dtype=torch.float64)
    elman.weight_ih.data = torch.eye(K, dtype=torch.float64)
    elman.weight_hh.data = weight[0, 0].T
    h = g = state[:, 0, 0]
    for t in range(5):
        h, g = gru(gates[:, t].flatten(1), h), elman(gates[:, t, 0, 0], g)
    for cell, want, G in (("gru", h, 3), ("elman", g, 1)):
        _, final = head_rnn(gates[:, :, :G], weight[:G], cell, initial_state=state, backend="reference")
        torch.testing.assert_close(final[:, 0, 0], want)


def test_slstm_is_the_unstabilised_one_in_scalars():
    """Without a stabiliser: c = e^f' c + e^i tanh(z), n = e^f' n + e^i, h = σ(o) c / n, with e^f' = σ(f)."""
    gates, weight, _ = (x.detach() for x in make_inputs("slstm", 1, 6, 1, 1))
    out, final = head_rnn(gates, weight, "slstm", backend="reference")
    c = n = h = 0.0
    for t in range(6):
        i, f, z, o = (gates[0, t, g, 0, 0].item() + weight[g, 0, 0, 0].item() * h for g in range(4))
        keep = 1 / (1 + math.exp(-f))
        c, n = keep * c + math.exp(i) * math.tanh(z), keep * n + math.exp(i)
        h = c / n / (1 + math.exp(-o))
        assert out[0, t, 0, 0].item() == pytest.approx(h, abs=1e-12)
    stabiliser = math.exp(final[0, 2, 0, 0].item())
    assert final[0, 0, 0, 0].item() * stabiliser == pytest.approx(c)
    assert final[0, 1, 0, 0].item() * stabiliser == pytest.approx(n)


@every_cell
@pytest.mark.parametrize("T", [1, 2, 7, 31])
@pytest.mark.parametrize("use_state", [True, False])
def test_chunked_equals_reference(cell, T, use_state):
    inputs = make_inputs(cell, 2, T, 2, 5)
    want = run(cell, inputs, use_state, backend="reference")
    torch.testing.assert_close(run(cell, inputs, use_state, backend="chunked"), want, rtol=1e-9, atol=1e-9)


@every_cell
@pytest.mark.parametrize("gate_scale", [1.0, 20.0, 300.0])
def test_chunked_equals_reference_on_documents(cell, gate_scale):
    inputs = make_inputs(cell, 1, sum(DOCUMENTS), 2, 4, S=len(DOCUMENTS), gate_scale=gate_scale)
    options = {"cu_seqlens": bounds_of(DOCUMENTS)}
    for use_state in (True, False):
        want = run(cell, inputs, use_state, backend="reference", **options)
        assert all(x.isfinite().all() for x in want)
        got = run(cell, inputs, use_state, backend="chunked", **options)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_cell
@pytest.mark.parametrize("shape", [(2, 5, 2, 16), (18, 3, 1, 5), (1, 7, 1, 33)])
@pytest.mark.parametrize("use_state", [True, False])
def test_triton_equals_reference(cell, shape, use_state):
    inputs = make_inputs(cell, *shape)
    assert_triton_equals_reference(cell, inputs, use_state)


@every_cell
@pytest.mark.parametrize("gate_scale", [1.0, 20.0])
def test_triton_equals_reference_on_documents(cell, gate_scale):
    inputs = make_inputs(cell, 1, sum(DOCUMENTS), 2, 4, S=len(DOCUMENTS), gate_scale=gate_scale)
    assert_triton_equals_reference(cell, inputs, True, cu_seqlens=bounds_of(DOCUMENTS))
    assert_triton_equals_reference(cell, inputs, False, cu_seqlens=bounds_of(DOCUMENTS))


@every_cell
def test_gates_far_out_of_range_stay_finite(cell):
    """The gradients are differences of rounding then."""
    inputs = make_inputs(cell, 1, 9, 1, 4, gate_scale=300)
    want = run(cell, inputs, backend="reference")
    got = run(cell, [x.detach().float().requires_grad_() for x in inputs], backend="triton")
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in got)


def assert_triton_equals_reference(cell, inputs, use_state, **options):
    want = run(cell, inputs, use_state, backend="reference", **options)
    single = [x.detach().float().requires_grad_() for x in inputs]
    for got, expected in zip(run(cell, single, use_state, backend="triton", **options), want):
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= 2e-5 * expected.norm().clamp_min(1e-6)


@every_cell
def test_wide_heads_get_their_products_beforehand(cell, monkeypatch):
    from riverrun.kernels.head_rnn import triton_op

    monkeypatch.setattr(triton_op, "TWICE_ON_CHIP", 8)
    inputs = make_inputs(cell, 1, sum(DOCUMENTS), 2, 16, S=len(DOCUMENTS))
    assert_triton_equals_reference(cell, inputs, True, cu_seqlens=bounds_of(DOCUMENTS))


@every_cell
def test_a_prompt_may_be_split_anywhere(cell):
    gates, weight, state = (x.detach() for x in make_inputs(cell, 2, 9, 1, 4))
    want = head_rnn(gates, weight, cell, initial_state=state)
    for cut in (1, 4, 8):
        first, between = head_rnn(gates[:, :cut], weight, cell, initial_state=state)
        second, final = head_rnn(gates[:, cut:], weight, cell, initial_state=between)
        torch.testing.assert_close((torch.cat([first, second], 1), final), want)


@every_cell
def test_the_operator_tells_torch_its_shapes(cell):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def shapes():
        inputs = make_inputs(cell, 2, 3, 1, 4, dtype=torch.float32)
        return [(x.shape, x.dtype, x.stride()) for x in run(cell, inputs, backend="triton")]

    def run(cell, inputs, **options):
        h, final = head_rnn(inputs[0], inputs[1], cell, initial_state=inputs[2], **options)
        return [h, final, *torch.autograd.grad((h.sum(), final.sum()), inputs)]

    real = shapes()
    with FakeTensorMode():
        assert shapes() == real


def test_wrong_arguments_are_named():
    gates, weight = torch.zeros(1, 2, 4, 3, 5), torch.zeros(4, 3, 5, 5)
    for arguments, options, message in [
        ((gates, weight, "rnn"), {}, "unknown cell 'rnn'; choose one of lstm"),
        ((gates, weight, "gru"), {}, r"gates of gru must have shape \(B, T, 3, H, K\)"),
        ((gates, weight[:3], "lstm"), {}, "weight must have shape"),
        ((gates, weight, "lstm"), {"initial_state": torch.zeros(1, 3, 3, 5)}, "initial_state must have shape"),
        ((gates, weight, "lstm"), {"cu_seqlens": torch.tensor([0, 1])}, "rise strictly from 0 to T=2"),
        ((torch.zeros(1, 2, 1, 1, 65), torch.zeros(1, 1, 65, 65), "elman"), {"backend": "triton"}, "up to 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            head_rnn(*arguments, **options)


@pytest.mark.parametrize("card", CARDS)
def test_compiles_for(card):
    compile_kernels, shared_limit = CARDS[card]
    kernels = compile_kernels(Path(__file__).with_name("launches_head_rnn.py"))
    assert {k["kernel"] for k in kernels} == {"forward_kernel", "backward_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= shared_limit, kernel
        assert kernel["stack"] == 0, f"spills: {kernel}"
        # two programs a multiprocessor, where the heads are narrow enough
        assert kernel["num_warps"] > 4 or kernel["shared"] <= shared_limit // 2, kernel
