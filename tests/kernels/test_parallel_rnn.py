"""ParallelCell: cells of one to three states given by their step alone, against autograd through a loop over it."""

import functools
import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch

from riverrun.kernels.common.shooting import take_statistics
from riverrun.kernels.para_gru import para_gru
from riverrun.kernels.para_lstm import para_lstm
from riverrun.kernels.parallel_rnn import ParallelCell
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import MIXERS

GUIDE = Path(__file__).parents[2] / "docs" / "bring-your-own-cell.md"
D = 4
DOCUMENTS = [1, 9, 30, 1, 17, 2]


def gru(state, u, weight):
    (h,), (u_z, u_r, u_n), (a_z, a_r, a_n) = state, u.unbind(1), weight
    z, r = torch.sigmoid(a_z * h + u_z), torch.sigmoid(a_r * h + u_r)
    n = torch.tanh(a_n * (r * h) + u_n)
    return ((1 - z) * h + z * n,)


def lstm(state, u, weight):
    """ParaLSTM, whose peepholes c_f, c_o are two weights more."""
    (c, h), (u_f, u_o, u_c), (a_f, a_o, a_c, c_f, c_o) = state, u.unbind(1), weight
    f = torch.sigmoid(a_f * h + c_f * c + u_f)
    c = f * c + (1 - f) * torch.tanh(a_c * h + u_c)
    return c, torch.sigmoid(a_o * h + c_o * c + u_o) * torch.tanh(c)


def rotor(state, u, weight):
    """Two states turned by an angle that depends on the third, which remembers the first: a full 3 × 3 block."""
    x, y, slow = state
    angle, keep = weight[0] * slow + u[:, 0], torch.sigmoid(u[:, 1] + weight[1] * y)
    turned = torch.tanh(angle.cos() * x - angle.sin() * y + u[:, 2]), angle.sin() * x + angle.cos() * y
    return *(0.7 * t for t in turned), keep * slow + (1 - keep) * x


CELLS = {"gru": ParallelCell(gru), "lstm": ParallelCell(lstm, num_states=2), "rotor": ParallelCell(rotor, num_states=3)}
WEIGHTS = {"gru": 3, "lstm": 5, "rotor": 2}
every_cell = pytest.mark.parametrize("name", CELLS)


@pytest.fixture(autouse=True)
def statistics():
    take_statistics()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*did not converge")
        yield


def make_inputs(name, B, T, num_sequences=None, bound=0.5, dtype=torch.float64):
    """gates, weight, initial_state, all leaves."""
    weight = (torch.rand(WEIGHTS[name], D) * 2 - 1) * bound
    inputs = torch.randn(B, T, 3, D), weight, torch.randn(num_sequences or B, CELLS[name].num_states, D)
    return [t.to(dtype).requires_grad_() for t in inputs]


def run(name, inputs, **options):
    gates, weight, initial = inputs
    states, final = CELLS[name](gates, weight, initial_state=initial, **options)
    return *states, final


def forward_and_gradients(function, inputs):
    out = function(inputs)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in out]
    return [*out, *torch.autograd.grad(out, inputs, upstream)]


def loop(name, inputs, bounds):
    """What `run` gives, one token of one sequence at a time."""
    gates, weight, initial = inputs
    outs, finals = [], []
    for s, (row, start, end) in enumerate(bounds):
        state, out = tuple(x[None] for x in initial[s]), []
        for t in range(start, end):
            state = CELLS[name].step(state, gates[row, None, t], weight)
            out.append(torch.cat(state))  # (K, D)
        outs.append(torch.stack(out, 1))
        finals.append(torch.cat(state))
    states = torch.cat(outs, 1).reshape(len(outs[0]), *gates.shape[:2], D)
    return *states.unbind(0), torch.stack(finals)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_equals_loop(name, inputs, cu_seqlens=None, **options):
    options = {"tolerance": 1e-12, "backend": "chunked", "cu_seqlens": cu_seqlens} | options
    if cu_seqlens is None:
        bounds = [(row, 0, inputs[0].shape[1]) for row in range(len(inputs[0]))]
    else:
        bounds = [(0, start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]
    got = forward_and_gradients(functools.partial(run, name, **options), inputs)
    want = forward_and_gradients(functools.partial(loop, name, bounds=bounds), inputs)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@every_cell
@pytest.mark.parametrize("bound", [0.5, 3.0])
@pytest.mark.parametrize(
    "T, chunk_size, backend",
    [
        (1, 4, "chunked"),
        (7, 2, "chunked"),
        (50, 8, "chunked"),
        (50, None, "auto"),
        (20, 20, "chunked"),
        (9, None, "reference"),
    ],
)
def test_equals_the_loop(name, T, chunk_size, backend, bound):
    assert_equals_loop(name, make_inputs(name, 2, T, bound=bound), chunk_size=chunk_size, backend=backend)


@every_cell
@pytest.mark.parametrize("bound", [0.5, 3.0])
@pytest.mark.parametrize("chunk_size, backend", [(4, "chunked"), (None, "chunked"), (None, "reference")])
def test_equals_the_loop_on_documents(name, chunk_size, backend, bound):
    inputs = make_inputs(name, 1, sum(DOCUMENTS), len(DOCUMENTS), bound)
    assert_equals_loop(name, inputs, bounds_of(DOCUMENTS), chunk_size=chunk_size, backend=backend)


@pytest.mark.parametrize("packed", [False, True])
def test_a_gru_in_five_lines_is_para_gru(packed):
    B, S = (1, len(DOCUMENTS)) if packed else (2, 2)
    cu_seqlens = bounds_of(DOCUMENTS) if packed else None
    inputs = make_inputs("gru", B, sum(DOCUMENTS), S)
    options = {"cu_seqlens": cu_seqlens, "chunk_size": 8, "tolerance": 1e-12}

    def built_in(inputs):
        h, final = para_gru(*inputs[:2], initial_state=inputs[2][:, 0], backend="chunked", **options)
        return h, final[:, None]

    got = forward_and_gradients(functools.partial(run, "gru", **options), inputs)
    torch.testing.assert_close(got, forward_and_gradients(built_in, inputs), rtol=1e-10, atol=1e-10)


def test_an_lstm_is_para_lstm():
    inputs = make_inputs("lstm", 2, 40)
    options = {"chunk_size": 8, "tolerance": 1e-12}

    def built_in(inputs):
        gates, weight, initial = inputs
        return para_lstm(gates, weight[:3], weight[3:], initial_state=initial, backend="chunked", **options)

    def own(inputs):
        return run("lstm", inputs, **options)[1:]

    want = forward_and_gradients(built_in, inputs)
    torch.testing.assert_close(forward_and_gradients(own, inputs), want, rtol=1e-10, atol=1e-10)


@every_cell
def test_is_solved_in_parallel_and_reported(name):
    run(name, make_inputs(name, 2, 256, dtype=torch.float32), chunk_size=16)
    statistics = take_statistics()
    assert list(statistics) == [name]
    assert statistics[name].pieces == 1 and statistics[name].fallbacks == statistics[name].sequential == 0
    assert 2 <= statistics[name].passes <= 6 and statistics[name].change <= 1e-5


@every_cell
def test_convergence_is_quadratic(name):
    """The mark of a right Jacobian."""
    run(name, make_inputs(name, 2, 256), chunk_size=4, tolerance=1e-13, max_passes=20)
    assert take_statistics()[name].passes <= 8


@every_cell
def test_unconverged_solves_are_finished_step_by_step(name):
    inputs = make_inputs(name, 2, 60, bound=3.0)
    options = {"chunk_size": 2, "max_passes": 2, "tolerance": 1e-14}
    with pytest.warns(RuntimeWarning, match=f"{name}: shooting did not converge"):
        run(name, inputs, **options)
    assert take_statistics()[name].fallbacks == 1
    assert_equals_loop(name, inputs, **options)


def test_chaotic_weights_give_the_right_answer():
    gates = torch.zeros(1, 40, 3, D, dtype=torch.float64)
    gates[:, :, :2] = 4.0
    gates[:, :, 2] = 0.1 * torch.randn(40, D)
    weight = torch.tensor([2.0, -3.0, -3.0], dtype=torch.float64)[:, None].repeat(1, D)
    inputs = [t.requires_grad_() for t in (gates, weight, torch.full((1, 1, D), 0.3, dtype=torch.float64))]
    assert_equals_loop("gru", inputs, chunk_size=4, max_passes=3)
    assert take_statistics()["gru"].fallbacks == 1


@every_cell
def test_gradcheck(name):
    inputs = make_inputs(name, 1, 5, 2, bound=0.9)
    options = {"chunk_size": 2, "tolerance": 1e-14, "cu_seqlens": bounds_of([1, 4]), "backend": "chunked"}
    assert torch.autograd.gradcheck(lambda *inputs: run(name, inputs, **options), inputs)


@every_cell
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_near_float64(name, dtype, tolerance, autocast):
    gates, *rest = make_inputs(name, 2, 100, dtype=torch.float32)
    inputs = [gates.detach().to(dtype).requires_grad_(), *rest]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = forward_and_gradients(functools.partial(run, name, chunk_size=16), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = forward_and_gradients(functools.partial(run, name, backend="reference"), exact)
    K = CELLS[name].num_states
    assert [t.dtype for t in got] == [dtype] * K + [torch.float32, dtype, torch.float32, torch.float32]
    for g, w in zip(got, want):
        assert (g - w).norm() < tolerance * w.norm()
    assert (got[K] - want[K]).norm() < 1e-4 * want[K].norm()


def test_products_among_the_states_of_a_channel_keep_their_precision():
    """A small block written as an einsum, which autocast would run in bfloat16."""

    def block(state, u, weight):
        matrix = weight.view(2, 2, -1)
        return torch.tanh(torch.einsum("ijd,jnd->ind", matrix, torch.stack(state)) + u.unbind(1)[0]).unbind(0)

    cell = ParallelCell(block, num_states=2)
    gates, weight = torch.randn(2, 50, 1, D, requires_grad=True), (torch.randn(4, D) / 3).requires_grad_()
    want = forward_and_gradients(lambda inputs: cell(*inputs, backend="reference")[0], [gates, weight])
    with torch.autocast("cpu", torch.bfloat16):
        got = forward_and_gradients(lambda inputs: cell(*inputs, chunk_size=8)[0], [gates, weight])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_states_that_ignore_the_past_and_weights_that_are_not_used():
    cell = ParallelCell(lambda state, u, weight: (state[0] * 0.5 + u[:, 0], u[:, 0], state[1]), 3, name="delays")
    gates, weight = torch.randn(1, 20, 1, D, requires_grad=True), torch.randn(1, D, requires_grad=True)
    (h, now, before), final = cell(gates, weight, chunk_size=4)
    torch.testing.assert_close((now[:, :-1], before[:, 1:]), (gates[:, :-1, 0], gates[:, :-1, 0]))
    grads = torch.autograd.grad(h[:, -1].sum() + final[:, 2].sum(), (gates, weight))
    want = 0.5 ** torch.arange(19, -1, -1)
    want[-2] += 1
    torch.testing.assert_close(grads, (want.view(1, 20, 1, 1).expand_as(gates), torch.zeros_like(weight)))


def test_a_straight_through_estimate_keeps_its_gradient():
    """The Jacobian is what autograd takes it for, and the solve gets there although it is not the true one."""

    def rounded(state, u, weight):
        h = torch.tanh(weight[0] * state[0] + u[:, 0])
        return (h + ((4 * h).round() / 4 - h).detach(),)

    cell = ParallelCell(rounded)
    gates, weight = torch.randn(1, 24, 1, D, dtype=torch.float64), torch.rand(1, D, dtype=torch.float64)
    inputs = [gates.requires_grad_(), weight.requires_grad_()]
    got, want = (
        forward_and_gradients(lambda inputs, b=b: cell(*inputs, backend=b, chunk_size=4)[0], inputs)
        for b in ("chunked", "reference")
    )
    torch.testing.assert_close(got, want)


@every_cell
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_prefill_then_steps_equal_one_call(name, mode):
    gates, weight, initial = make_inputs(name, 2, 20)
    with mode():
        whole = run(name, (gates, weight, initial), chunk_size=4, tolerance=1e-12)
        states, final = CELLS[name](gates[:, :17], weight, initial_state=initial, chunk_size=4, tolerance=1e-12)
        pieces = [states]
        for t in range(17, 20):
            states, final = CELLS[name](gates[:, t : t + 1], weight, initial_state=final)
            pieces.append(states)
    torch.testing.assert_close((*(torch.cat(p, 1) for p in zip(*pieces)), final), whole, rtol=1e-10, atol=1e-10)


def test_works_in_a_compiled_function():
    inputs = make_inputs("gru", 2, 20)

    def call(gates, weight, initial):
        (h,), _ = CELLS["gru"](gates * 2, weight, initial_state=initial, chunk_size=4)
        return (h * 2,)

    want = forward_and_gradients(lambda inputs: call(*inputs), inputs)
    got = forward_and_gradients(lambda inputs: torch.compile(call, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(got, want)


def test_as_a_decorator():
    @ParallelCell
    def leaky(state, u, weight):
        """h ← tanh(a h + u)"""
        return (torch.tanh(weight[0] * state[0] + u[:, 0]),)

    assert leaky.name == "leaky" and leaky.__doc__ == "h ← tanh(a h + u)" and leaky.num_states == 1
    (h,), _ = leaky(torch.ones(1, 1, 1, 2), torch.ones(1, 2), initial_state=torch.ones(1, 1, 2))
    torch.testing.assert_close(h, torch.full((1, 1, 2), 2.0).tanh())


# what a step must not do

U, H = (lambda u: u[:, 0]), (lambda state: state[0])
BROKEN = {
    "no tuple": (lambda state, u, w: H(state) + U(u), r"write `return \(h,\)`"),
    "too many states": (lambda state, u, w: (H(state), U(u)), r"returned 2 states, .*step, num_states=2\)"),
    "no tensor": (lambda state, u, w: (0.0,), "new state 0 must be a tensor, got float"),
    "all gates": (lambda state, u, w: (H(state)[:, None] + u,), r"must have the shape \(N, D\) .*got \(8, 2, 4\)"),
    "cast": (lambda state, u, w: (H(state).bfloat16() + U(u).bfloat16(),), "must stay torch.float32, got .*bfloat16"),
    "in place": (lambda state, u, w: (H(state).mul_(0.5) + U(u),), "changes its arguments in place"),
    "dropout": (lambda state, u, w: (torch.dropout(H(state), 0.5, True) + U(u),), "something else on every call"),
    "shift": (lambda state, u, w: (H(state).roll(1, 1) + U(u),), "mixes channels"),
    "distant shift": (lambda state, u, w: (H(state).roll(2, 1) + U(u),), "mixes channels"),
    "norm": (lambda state, u, w: (torch.layer_norm(H(state), (D,)) + U(u),), "mixes channels"),
    "one channel": (lambda state, u, w: (H(state) + 1e-3 * U(u)[:, 3:],), "mixes channels"),
    "mixed weights": (lambda state, u, w: (H(state) * w.softmax(1)[0] + U(u),), "mixes channels"),
    "matrix": (lambda state, u, w: (H(state) @ torch.ones(D, D) + U(u),), "mixes channels.*head_rnn"),
    "rows": (lambda state, u, w: (H(state) - U(u).mean(0),), "mixes rows"),
    "rows of states": (lambda state, u, w: (H(state).cumsum(0),), "mixes rows"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_broken_steps_are_refused(what, backend):
    step, message = BROKEN[what]
    cell = ParallelCell(step, name="broken")
    for _ in range(2):  # a step that was refused is not taken for a good one later
        with pytest.raises(ValueError, match=f"broken: .*{message}"):
            cell(torch.zeros(2, 6, 2, D), torch.zeros(2, D), backend=backend)


@pytest.mark.parametrize("channels", [2, 3, 17, 64])
def test_every_pair_of_channels_is_kept_apart(channels):
    for _ in range(20):
        source, target = torch.randperm(channels)[:2].tolist()

        def leak(state, u, weight, source=source, target=target):
            h = torch.tanh(weight[0] * state[0] + u[:, 0])
            return (torch.cat([h[:, :target], h[:, target, None] + 1e-4 * h[:, source, None], h[:, target + 1 :]], 1),)

        with pytest.raises(ValueError, match="mixes channels"):
            ParallelCell(leak)(torch.zeros(1, 2, 1, channels), torch.zeros(1, channels))


def test_an_error_inside_the_step_tells_what_it_was_called_with():
    def wrong(state, u, weight):
        c, h = state
        return (c + h,)

    with pytest.raises(ValueError, match="not enough values") as raised:
        ParallelCell(wrong)(torch.zeros(1, 2, 1, D), torch.zeros(1, D))
    assert "raised by the step of wrong, with a tuple of 1 state(s) (8, 4), u (8, 1, 4)" in raised.value.__notes__[0]


@every_cell
@pytest.mark.parametrize(
    "changed, shape",
    [(0, (2, 6, D)), (0, (2, 0, 3, D)), (1, (D,)), (1, (3, D + 1)), (2, (3, 1, D)), (2, (2, 4, D)), (2, (2, D))],
)
def test_bad_shapes(name, changed, shape):
    inputs = make_inputs(name, 2, 6)
    inputs[changed] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{name}: {('gates', 'weight', 'initial_state')[changed]} must have shape"):
        run(name, inputs)


def test_bad_options():
    gates, weight, initial = make_inputs("gru", 2, 6)
    for option, value in [("chunk_size", 0), ("max_passes", 0), ("tolerance", 0.0), ("backend", "fast")]:
        with pytest.raises(ValueError, match=option):
            run("gru", (gates, weight, initial), **{option: value})
    with pytest.raises(ValueError, match="no Triton kernel"):
        run("gru", (gates, weight, initial), backend="triton")
    with pytest.raises(ValueError, match="num_states must be at least 1"):
        ParallelCell(gru, num_states=0)
    for backend in ("reference", "chunked"):
        with pytest.raises(ValueError, match="one row"):
            run("gru", (gates, weight, initial), cu_seqlens=bounds_of([2, 4]), backend=backend)
        with pytest.raises(ValueError, match="rise strictly"):
            run("gru", (gates[:1], weight, initial), cu_seqlens=bounds_of([2, 3]), backend=backend)


# the documented example


def guide() -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL))


def test_the_guide_runs_and_its_mixer_learns_decodes_and_resets():
    before = dict(MIXERS)
    namespace: dict = {"__name__": "guide"}
    try:
        exec(guide(), namespace)
    finally:
        MIXERS.clear()
        MIXERS.update(before)
    losses = namespace["losses"]
    assert losses[-1] < 0.5 * losses[0]
    statistics = namespace["statistics"]
    assert statistics.pieces > 0 and statistics.fallbacks == statistics.sequential == 0

    mixer = namespace["LightMixer"](namespace["LightOptions"](), 8, 1e-5)
    mixer.reset_parameters()
    assert set(mixer.parameter_plan()) == {name for name, _ in mixer.named_parameters()}
    x = torch.randn(2, 6, 8)
    full = mixer(x, Layout.of_rows((2, 6), torch.zeros(2, dtype=torch.long)))
    states: dict[str, torch.Tensor] = {}
    parts = [mixer(x[:, :4], Layout.of_rows((2, 4), torch.zeros(2, dtype=torch.long)), states)]
    parts += [mixer(x[:, t : t + 1], Layout.of_rows((2, 1), torch.full((2,), t)), states) for t in (4, 5)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full)
    packed = mixer(x[:1], Layout.of_documents((1, 6), torch.tensor([0, 2, 6], dtype=torch.int32)))
    alone = mixer(x[:1, 2:], Layout.of_rows((1, 4), torch.zeros(1, dtype=torch.long)))
    torch.testing.assert_close(packed[:, 2:], alone)


def test_the_cell_of_the_docstring_runs():
    import riverrun.kernels.parallel_rnn as package

    code = re.search(r"    @ParallelCell\n.*?(?=\n    \(h,\), final_state)", package.__doc__, re.DOTALL).group()
    namespace = {"ParallelCell": ParallelCell, "torch": torch}
    exec(re.sub("^    ", "", code, flags=re.MULTILINE), namespace)
    (h,), final = namespace["light_cell"](torch.randn(2, 9, 2, D), torch.randn(1, D))
    assert h.shape == (2, 9, D) and final.shape == (2, 1, D)
    assert namespace["light_cell"].step.__name__ == "light_cell"
