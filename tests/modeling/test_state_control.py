"""Training-free remedies for Mamba-2: what each does to the state, in one call and over many."""

import math

import pytest
import torch
from torch.nn import functional as F

from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixer_options import Mamba2Options
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.state_control import NORM_CHUNK, StateControl, set_state_control

H, P, N, T = 4, 8, 6, 300
CONTROLS = {
    "retention": StateControl(retention=0.99, insertion=0.75),
    "dt_scale": StateControl(dt_scale=0.3),
    "max_norm": StateControl(max_norm=0.5),
    "window": StateControl(window=64, retention=0.999, dt_scale=0.5),
}


@pytest.fixture
def model():
    options = ModelOptions(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, intermediate_size=0, initializer_range=0.3,
        layer_pattern=("mamba2",),
        mamba2=Mamba2Options(head_dim=P, state_size=N, num_groups=2, chunk_size=16, conv_kernel=1, A_init_max=2.0),
    )  # fmt: skip
    return RiverrunForCausalLM(RiverrunConfig.from_options(options)).eval()


@pytest.fixture
def inputs():
    """x, Δ, A, B, C, D of one layer; some heads hardly decay."""
    x, B, C = torch.randn(2, T, H, P), torch.randn(2, T, 2, N), torch.randn(2, T, 2, N)
    return x, F.softplus(torch.randn(2, T, H) - 2), -torch.tensor([1e-4, 0.1, 1.0, 8.0]), B, C, torch.randn(H)


def run(control, inputs, layout=None, states=None):
    x = inputs[0]
    layout = layout or Layout.of_rows(x.shape[:2], torch.zeros(len(x), dtype=torch.int64))
    states = {} if states is None else states
    return control.ssd(*inputs, layout=layout, states=states, chunk_size=32), states


def by_definition(control, x, dt, A, B, C, D):
    """A step at a time in float64: y (B, T, H, P), and every state."""
    x, dt, A, B, C, D = (t.double() for t in (x, dt, A, B, C, D))
    B, C = B.repeat_interleave(H // 2, dim=2), C.repeat_interleave(H // 2, dim=2)
    h, ys, hs = x.new_zeros(len(x), H, P, N), [], []
    for t in range(x.shape[1]):
        delta = control.dt_scale * dt[:, t]
        alpha = control.retention * (delta * A).exp()
        u = torch.einsum("bh,bhp,bhn->bhpn", delta, x[:, t], control.insertion * B[:, t])
        h = alpha[..., None, None] * h + u
        seen = h
        ys.append(torch.einsum("bhpn,bhn->bhp", seen, C[:, t]) + D[:, None] * x[:, t])
        if (t + 1) % NORM_CHUNK == 0:
            norm = h.flatten(2).norm(dim=2)[..., None, None]
            h = torch.where(norm > control.max_norm, h * control.max_norm / norm, h)
        hs.append(h)
    return torch.stack(ys, dim=1), hs


@pytest.mark.parametrize("name", ["retention", "dt_scale", "max_norm"])
def test_a_control_is_its_definition(name, inputs):
    y, states = run(CONTROLS[name], inputs)
    want, hs = by_definition(CONTROLS[name], *inputs)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states["ssd"].double(), hs[-1], rtol=1e-4, atol=1e-4)
    plain, _ = by_definition(StateControl(), *inputs)
    assert (plain - want).abs().max() > 0.1, "the example must need it"


@pytest.mark.parametrize("r", [1, 64])
@pytest.mark.parametrize("control", [StateControl(), StateControl(retention=0.999, insertion=0.5, dt_scale=0.5)])
def test_a_window_is_a_fresh_run_over_the_last_tokens(r, control, inputs):
    x, dt, A, B, C, D = inputs
    windowed = StateControl(**(control.settings() | {"window": r}))
    y, states = run(windowed, inputs)
    want, hs = by_definition(control, *(p[:, T - r :] for p in (x, dt)), A, *(p[:, T - r :] for p in (B, C)), D)
    torch.testing.assert_close(states["ssd"].double(), hs[-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(y[:, -1].double(), want[:, -1], rtol=0, atol=1e-4)
    early, _ = by_definition(control, *(p[:, :r] for p in (x, dt)), A, *(p[:, :r] for p in (B, C)), D)
    torch.testing.assert_close(y[:, :r].double(), early, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [1, 64])
def test_a_windowed_model_of_one_layer_answers_as_after_its_last_tokens_alone(model, r):
    ids = torch.randint(0, 50, (2, 150))
    plain = model(ids).logits[:, -1]
    set_state_control(model, StateControl(window=r))
    got = model(ids, use_cache=True).logits[:, -1]
    set_state_control(model, None)
    torch.testing.assert_close(got, model(ids[:, -r:]).logits[:, -1], rtol=0, atol=1e-4)
    assert (plain - got).abs().max() > 1e-2


@pytest.mark.parametrize("name", CONTROLS)
def test_pieces_of_any_length_give_what_one_call_gives(model, name):
    ids = torch.randint(0, 50, (2, 290))
    set_state_control(model, CONTROLS[name])
    whole, cache, parts = model(ids).logits, RiverrunCache(1), []
    for piece in ids.split([1, 130, 1, 98, 60], dim=1):
        parts.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONTROLS)
def test_packed_and_padded_sequences_are_controlled_one_by_one(model, name):
    a, b = torch.randint(0, 50, (1, 170)), torch.randint(0, 50, (1, 140))
    set_state_control(model, CONTROLS[name])
    alone = [model(ids).logits[0] for ids in (a, b)]
    packed = model(torch.cat([a, b], dim=1), cu_seqlens=torch.tensor([0, 170, 310], dtype=torch.int32)).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    padded = torch.cat([a, F.pad(b, (30, 0))])
    mask = torch.ones_like(padded)
    mask[1, :30] = 0
    out = model(padded, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(out.logits[1, 30:], alone[1], rtol=1e-4, atol=1e-4)
    more = torch.randint(0, 50, (2, 3))
    after = model(more, attention_mask=F.pad(mask, (0, 3), value=1), past_key_values=out.past_key_values).logits
    want = model(torch.cat([b, more[1:]], dim=1)).logits[0, -3:]
    torch.testing.assert_close(after[1], want, rtol=1e-4, atol=1e-4)


def test_no_control_and_one_that_changes_nothing_are_the_model_bit_for_bit(model):
    ids = torch.randint(0, 50, (2, 200))
    plain = model(ids, use_cache=True)
    for control in (StateControl(), StateControl.parse("retention=1,insertion=1,dt_scale=1,max_norm=inf")):
        assert control.settings() == {}
        set_state_control(model, control)
        same = model(ids, use_cache=True)
        assert torch.equal(same.logits, plain.logits)
        assert torch.equal(same.past_key_values.layers[0]["ssd"], plain.past_key_values.layers[0]["ssd"])


def test_controls_are_read_from_text():
    control = StateControl.parse("retention=0.9999, insertion=0.75")
    assert control == StateControl(retention=0.9999, insertion=0.75)
    assert control.settings() == {"retention": 0.9999, "insertion": 0.75}
    assert StateControl.parse("window=8192").settings() == {"window": 8192}
    decay = torch.tensor([-0.5])
    assert StateControl(retention=0.9, dt_scale=0.5).log_decay(decay).item() == pytest.approx(math.log(0.9) - 0.25)


@pytest.mark.parametrize(
    "text, message",
    [
        ("windows=3", "is no state control: give dt_scale, insertion, max_norm, retention, window"),
        ("retention", "is no state control"),
        ("", "is no state control"),
        ("retention=high", "retention=high must be a number"),
        ("window=2.5", "must be a whole number"),
        ("window=0", "must be at least 1 token"),
        ("retention=1.1", "at most 1"),
        ("max_norm=0", "must be positive"),
        ("insertion=nan", "must be positive"),
        ("window=8,max_norm=3", "do not go together"),
    ],
)
def test_what_is_no_control_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        StateControl.parse(text)


def test_a_model_without_mamba2_layers_is_refused():
    options = ModelOptions(vocab_size=8, hidden_size=64, num_hidden_layers=1, layer_pattern=("attention",))
    with pytest.raises(ValueError, match="this model has none"):
        set_state_control(RiverrunForCausalLM(RiverrunConfig.from_options(options)), StateControl(window=4))
