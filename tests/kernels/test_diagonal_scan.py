"""diagonal_scan: the step loop against the sum written out, the chunked form against the step loop in float64; the
Triton kernels, run by Triton's interpreter, against the step loop in float64, and compiled for GPUs."""

from pathlib import Path

import pytest
import torch
from compiling import CARDS

from riverrun.kernels.diagonal_scan import chunked, diagonal_scan, triton_op

D = 5
DOCUMENTS = [1, 9, 2, 1, 17, 3]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton kernels
WIDE = {False: torch.float64, True: torch.complex128}
SINGLE = {False: torch.float32, True: torch.complex64}

both_numbers = pytest.mark.parametrize("use_complex", [False, True])
both_decays = pytest.mark.parametrize("constant", [False, True])


def make_inputs(B, T, S=None, use_complex=False, constant=False):
    """x, a, initial_state. Decays of both signs or all directions, most of them long."""
    dtype = WIDE[use_complex]
    shape = (D,) if constant else (B, T, D)
    size = 1 - torch.rand(shape, dtype=torch.float64) ** 3
    turn = torch.randn(shape, dtype=dtype).sgn()
    return [torch.randn(B, T, D, dtype=dtype), turn * size, torch.randn(S or B, D, dtype=dtype)]


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(inputs, use_state=True, use_final=True, **options):
    """h, final state and the gradients of all inputs, under the same upstream gradients for every dtype."""
    x, a, state = inputs = [t.detach().clone().requires_grad_() for t in inputs]
    h, final = diagonal_scan(x, a, initial_state=state if use_state else None, **options)
    outputs = [h, final] if use_final else [h]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(*t.shape, 2, generator=generator).bfloat16().float() for t in outputs]
    upstream = [torch.view_as_complex(g) if x.is_complex() else g[..., 0] for g in upstream]
    upstream = [g.to(t) for g, t in zip(upstream, outputs)]
    return [h, final, *torch.autograd.grad(outputs, inputs if use_state else inputs[:2], upstream)]


@both_decays
@both_numbers
def test_reference_equals_the_sum_written_out(use_complex, constant):
    x, a, state = make_inputs(2, 9, use_complex=use_complex, constant=constant)
    h, final = diagonal_scan(x, a, initial_state=state, backend="reference")
    a = a.expand_as(x)
    for t in range(9):
        want = a[:, : t + 1].prod(1) * state
        for k in range(t + 1):
            want = want + a[:, k + 1 : t + 1].prod(1) * x[:, k]
        torch.testing.assert_close(h[:, t], want, rtol=1e-12, atol=1e-12)
    assert torch.equal(final, h[:, -1])


def assert_chunked_equals_reference(inputs, **options):
    want = run(inputs, backend="reference", **options)
    torch.testing.assert_close(run(inputs, backend="chunked", **options), want, rtol=1e-10, atol=1e-10)


@both_decays
@both_numbers
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_chunked_rows(T, use_complex, constant):
    assert_chunked_equals_reference(make_inputs(2, T, use_complex=use_complex, constant=constant))


@both_decays
@both_numbers
@pytest.mark.parametrize("lengths", [DOCUMENTS, [64, 1, 200, 65, 3]])
def test_chunked_documents(lengths, use_complex, constant):
    inputs = make_inputs(1, sum(lengths), len(lengths), use_complex, constant)
    assert_chunked_equals_reference(inputs, cu_seqlens=bounds_of(lengths))
    assert_chunked_equals_reference(inputs, cu_seqlens=bounds_of(lengths), use_state=False, use_final=False)


def test_chunked_documents_start_anywhere(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_SIZE", 4)
    inputs = make_inputs(1, 13, 3)
    for first in range(1, 12):
        for second in range(first + 1, 13):
            cu_seqlens = torch.tensor([0, first, second, 13])
            assert_chunked_equals_reference(inputs, cu_seqlens=cu_seqlens)


@both_decays
@both_numbers
def test_gradcheck(use_complex, constant, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_SIZE", 2)
    inputs = [t.requires_grad_() for t in make_inputs(1, 7, 3, use_complex, constant)]

    def call(x, a, state):
        return diagonal_scan(x, a, initial_state=state, cu_seqlens=bounds_of([1, 4, 2]), backend="chunked")

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_decays_of_zero_and_products_that_underflow(backend):
    """Nothing is divided by a product of decays."""
    x, a, state = (t.float().to(DEVICE) for t in make_inputs(1, 200))
    a[..., 0], a[..., 1], a[:, ::7, 2], a[..., 3] = 0, 1e-20, 0, -1
    want = run([t.double() for t in (x, a, state)], backend="reference")
    for got, exact in zip(run([x, a, state], backend=backend), want):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@both_numbers
def test_steps_equal_one_call(backend, use_complex):
    x, a, state = (t.to(SINGLE[use_complex]).to(DEVICE) for t in make_inputs(2, 7, use_complex=use_complex))
    whole = diagonal_scan(x, a, initial_state=state, backend=backend)
    hs = []
    for x_t, a_t in zip(x.split(1, dim=1), a.split(1, dim=1)):
        h, state = diagonal_scan(x_t, a_t, initial_state=state, backend=backend)
        hs.append(h)
    torch.testing.assert_close((torch.cat(hs, 1), state), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_dtypes(backend):
    """h and the gradients have their arguments' types; states are in single precision at least, and not rounded."""
    x, a, state = make_inputs(1, 12)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        if backend == "triton" and dtype == torch.float64:
            continue
        wide = torch.promote_types(dtype, torch.float32)
        for kinds in ((dtype, dtype, wide), (dtype, torch.float32, dtype), (dtype, torch.float64, torch.float64)):
            rounded = [t.to(kind).to(DEVICE) for t, kind in zip((x, a, state), kinds)]
            got = run(rounded, backend=backend)
            want = run([t.double() for t in rounded], backend="reference")
            assert [t.dtype for t in got] == [dtype, wide, *kinds]
            # Triton's interpreter cuts off the digits beyond bfloat16, a GPU rounds
            for one, other in zip(got, want):
                tolerance = 6e-3 if one.dtype.itemsize == 2 else 1e-6
                assert (one - other).norm() <= tolerance * other.norm()


def test_no_state_is_zeros():
    x, a, state = make_inputs(1, 33, len(DOCUMENTS))
    for backend in ("reference", "chunked"):
        options = {"cu_seqlens": bounds_of(DOCUMENTS), "backend": backend}
        got = diagonal_scan(x, a, **options)
        torch.testing.assert_close(got, diagonal_scan(x, a, initial_state=state * 0, **options))


def assert_triton_equals_reference(inputs, use_state=True, use_final=True, lengths=None):
    single = [t.to(SINGLE[t.is_complex()]) for t in inputs]
    options = {"use_state": use_state, "use_final": use_final}
    cu_seqlens = bounds_of(lengths) if lengths else None
    want = run([t.to(WIDE[t.is_complex()]) for t in single], backend="reference", cu_seqlens=cu_seqlens, **options)
    cu_seqlens = cu_seqlens.to(DEVICE) if lengths else None
    got = run([t.to(DEVICE) for t in single], backend="triton", cu_seqlens=cu_seqlens, **options)
    for one, other in zip(got, want):
        assert one.shape == other.shape and one.dtype == SINGLE[other.is_complex()]
        assert (one.cpu() - other).norm() <= 1e-6 * other.norm()


@both_decays
@both_numbers
@pytest.mark.parametrize("T", [1, 16, 43])
def test_triton_rows(T, use_complex, constant):
    assert_triton_equals_reference(make_inputs(2, T, use_complex=use_complex, constant=constant))


@both_decays
@both_numbers
def test_triton_long_memories(use_complex, constant):
    """Products of decays next to one would all be rounded in one direction."""
    T = 8192
    dtype = WIDE[use_complex]
    turn = torch.ones(1, dtype=dtype) if constant else torch.randn(1, T, 1, dtype=dtype).sgn()
    a = turn * torch.exp(-torch.rand(turn.shape, dtype=torch.float64) / 1e4)
    assert_triton_equals_reference([torch.randn(1, T, 1, dtype=dtype), a, torch.randn(1, 1, dtype=dtype)])


@pytest.mark.parametrize("use_state, use_final", [(True, True), (True, False), (False, True), (False, False)])
@both_numbers
def test_triton_documents(use_complex, use_state, use_final):
    inputs = make_inputs(1, sum(DOCUMENTS), len(DOCUMENTS), use_complex)
    assert_triton_equals_reference(inputs, use_state, use_final, DOCUMENTS)


@both_decays
@both_numbers
def test_triton_with_one_chunk(use_complex, constant, monkeypatch):
    """As where the channels are very many."""
    monkeypatch.setattr(triton_op, "FULL", 0)
    inputs = make_inputs(1, sum(DOCUMENTS), len(DOCUMENTS), use_complex, constant)
    assert_triton_equals_reference(inputs, lengths=DOCUMENTS)
    assert_triton_equals_reference([*inputs[:2], inputs[2][:1]])


def test_triton_documents_start_anywhere():
    """Also where a chunk, or a block of them, starts or ends."""
    inputs = make_inputs(1, 20, 2)
    for bound in (1, 7, 8, 9, 16, 19):
        assert_triton_equals_reference(inputs, lengths=[bound, 20 - bound])
    for rest in range(1, 4):
        lengths = [rest, 4, 4, 4, 4, 4 - rest]
        assert_triton_equals_reference([*inputs[:2], torch.cat([inputs[2]] * 3)], lengths=lengths)


def test_triton_documents_of_one_token():
    assert_triton_equals_reference(make_inputs(1, 21, 21, constant=True), lengths=[1] * 21)


@pytest.mark.parametrize("channels, threads", [(8, 8), (24, 16)])
def test_triton_blocks_without_padding(channels, threads, monkeypatch):
    """Two blocks of two chunks; 8 channels fill a program's, 24 do not."""
    monkeypatch.setattr(triton_op, "MAX_THREADS", threads)
    x, a, state = (torch.cat([t] * 5, -1)[..., :channels].contiguous() for t in make_inputs(1, 32))
    assert triton_op.Launch.of(x).chunks == 2
    assert_triton_equals_reference([x, a, state])
    assert_triton_equals_reference([x, a, state.expand(3, -1)], lengths=[7, 9, 16])


def test_triton_takes_views():
    """Also such as autograd and conj() make, in which the numbers to read are not the numbers in memory."""
    x, a, _ = (t.to(torch.complex64).to(DEVICE) for t in make_inputs(2, 9, use_complex=True))
    wide = torch.stack([x, x], dim=-1).requires_grad_()
    results = []
    for view in (wide[..., 0].conj(), wide[..., 0].conj().resolve_conj().contiguous()):
        h, final = diagonal_scan(view, a.transpose(0, 1).contiguous().transpose(0, 1), backend="triton")
        results.append([h, final, *torch.autograd.grad((h.conj() * h).real.sum() + final.imag.sum(), wide)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_triton_without_gradients_nothing_is_saved_and_all_is_equal(dtype):
    inputs = [t.to(dtype) for t in make_inputs(2, 9, use_complex=dtype.is_complex)]
    with torch.no_grad():
        x, a, state = (t.to(DEVICE) for t in inputs)
        plain = diagonal_scan(x, a, initial_state=state, backend="triton")
        assert triton_op.scan(x, a, None, None, False)[2].numel() == 0
    torch.testing.assert_close(plain, tuple(run([x, a, state], backend="triton")[:2]), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
@both_decays
def test_the_operator_tells_torch_its_shapes(dtype, constant):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def shapes():
        inputs = make_inputs(2, 9, use_complex=dtype.is_complex, constant=constant)
        x, a, state = (t.to(dtype).requires_grad_() for t in inputs)
        h, final = triton_op.diagonal_scan_triton(x, a, state.to(torch.promote_types(dtype, torch.float32)), None)
        grads = torch.autograd.grad((h.real.sum(), final.real.sum()), [x, a, state])
        return [(t.shape, t.dtype, t.stride()) for t in (h, final, *grads)]

    real = shapes()
    with FakeTensorMode():
        assert shapes() == real


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@both_numbers
def test_compiles_without_graph_breaks(backend, use_complex):
    inputs = [t.to(SINGLE[use_complex]).to(DEVICE).requires_grad_() for t in make_inputs(2, 70, None, use_complex)]

    def call(x, a, state):
        if backend == "triton":
            return triton_op.diagonal_scan_triton(x, a, state, None)
        return diagonal_scan(x, a, initial_state=state, backend=backend)

    results = []
    for function in (torch.compile(call, backend="aot_eager", fullgraph=True), call):
        h, final = function(*inputs)
        loss = (h * h.conj()).real.sum() + final.real.sum()
        results.append([h, final, *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, shape", [("x", (2, D)), ("x", (2, 0, D)), ("a", (D + 1,)), ("a", (2, D)), ("initial_state", (3, D))]
)
def test_bad_shapes(name, shape):
    arguments = dict(zip(["x", "a", "initial_state"], make_inputs(2, 6)))
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"diagonal_scan: {name} must have shape"):
        diagonal_scan(**arguments)


def test_bad_dtypes():
    x, a, state = make_inputs(2, 6)
    with pytest.raises(ValueError, match="both real or both complex"):
        diagonal_scan(x, a.to(torch.complex64))
    with pytest.raises(ValueError, match="both real or both complex"):
        diagonal_scan(x.to(torch.complex64), a)
    with pytest.raises(ValueError, match="initial_state must be real"):
        diagonal_scan(x, a, initial_state=state.to(torch.complex64))
    with pytest.raises(ValueError, match=r"x must be of floating-point or complex numbers, got torch.int64"):
        diagonal_scan(x.long(), a)


def test_bad_options():
    x, a, _ = make_inputs(2, 6)
    with pytest.raises(ValueError, match="unknown backend"):
        diagonal_scan(x, a, backend="fast")
    for backend in ("reference", "chunked", "triton"):
        with pytest.raises(ValueError, match="one row"):
            diagonal_scan(x.float(), a, cu_seqlens=bounds_of([2, 4]), backend=backend)
    for backend in ("reference", "chunked"):
        with pytest.raises(ValueError, match="rise strictly"):
            diagonal_scan(x[:1], a[:1], cu_seqlens=bounds_of([2, 3]), backend=backend)
    for wide in (x, x.to(torch.complex128)):
        with pytest.raises(ValueError, match="use backend='chunked' for float64"):
            diagonal_scan(wide, a.to(wide.dtype), backend="triton")


@pytest.mark.parametrize("card", CARDS)
def test_compiles_for(card):
    compile_kernels, shared_limit = CARDS[card]
    kernels = compile_kernels(Path(__file__).with_name("launches_diagonal_scan.py"))
    assert {k["kernel"] for k in kernels} == {"forward_kernel", "backward_kernel", "_starts_kernel"}
    for kernel in kernels:
        assert kernel["shared"] <= shared_limit, kernel
        assert kernel["stack"] == 0, f"spills: {kernel}"
        # complex products of two numbers each; a second program of 8 warps would need less than 128 in any case
        complex_rows = kernel["launch"] == "launch_complex_packed"
        most = 160 if kernel["kernel"] == "forward_kernel" and not complex_rows else 192
        assert kernel["registers"] <= most, kernel
        # none at every block
        assert kernel["converts"] <= 2, kernel
