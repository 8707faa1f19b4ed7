"""The Universal Transformer against a loop over steps and positions; decoding, packing, losses, options."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.universal import offsets, sinusoids
from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.statistics import take_noted
from tests.modeling.test_model import BASE, SPLITS, WINDOWED, assert_close, tokens

STEPS = 4


def options(*pattern: str, model: dict | None = None, **universal) -> ModelOptions:
    universal = {"max_steps": STEPS} | universal
    base = replace(BASE, layer_pattern=pattern, num_hidden_layers=len(pattern), universal=UniversalOptions(**universal))
    return replace(base, **(model or {}))


SHAPES = {
    "attention": options("attention"),
    "without halting": options("attention", halting="none"),
    "one step": options("attention", max_steps=1),
    "two layers, pre-norm, rotary": options("attention", "attention", norm="pre", positions="rotary"),
    "a window, without positions": options("attention", positions="none", model={"attention": WINDOWED}),
    "hybrid": options("mamba2", "attention", "para_lstm", "gated_delta"),
    "without MLP": options("mamba2", model={"intermediate_size": 0, "tie_word_embeddings": True}),
    "scaled embedding": options("attention", model={"scale_embedding": True}),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def build(shape: str | ModelOptions, dtype: torch.dtype = torch.float64) -> RiverrunForCausalLM:
    """A model whose positions halt at various steps: halting listens to states, not to the slow waves' cosines, which
    are the same everywhere."""
    torch.manual_seed(0)
    chosen = SHAPES[shape] if isinstance(shape, str) else shape
    model = RiverrunForCausalLM(RiverrunConfig.from_options(chosen)).to(dtype).eval()
    if (halting := model.model.core.halting) is not None:
        with torch.no_grad():
            halting.weight[0::2].normal_(std=1.5)
            halting.weight[1::2].zero_()
            halting.bias.fill_(0.5)
    return model


def costs(model: RiverrunForCausalLM, ids: torch.Tensor, **layout) -> torch.Tensor:
    """N + R of every position (B, T)."""
    found = []
    handle = model.model.register_forward_hook(lambda module, inputs, out: found.append(out[1]))
    with torch.no_grad():
        model(ids, **layout)
    handle.remove()
    return found[0]


# the definition


def norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def attend(x, mixer):
    """Causal attention of one sequence x (T, h), a head at a time."""
    heads, kv_heads, dim = mixer.options.num_heads, mixer.options.num_kv_heads, mixer.options.head_dim
    q, k, v = (x @ p.weight.T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    seen, out = torch.ones(len(x), len(x)).tril().bool(), []
    for h in range(heads):
        g = h * kv_heads // heads
        query, key, value = (y[:, i * dim : (i + 1) * dim] for y, i in ((q, h), (k, g), (v, g)))
        scores = (query @ key.T / math.sqrt(dim)).masked_fill(~seen, -math.inf)
        out.append(scores.softmax(-1) @ value)
    return torch.cat(out, -1) @ mixer.o_proj.weight.T


def feed_forward(x, mlp):
    return (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def embedding_of_place(pos: int, t: int, h: int) -> list[float]:
    """P^t[pos], equation 6 of the paper, for t from 1."""
    found = []
    for i in range(h):
        wave, f = 10_000 ** (2 * (i // 2) / h), math.cos if i % 2 else math.sin
        found.append(f(pos / wave) + f(t / wave))
    return found


def by_definition(model: RiverrunForCausalLM, ids: torch.Tensor, first: int = 0):
    """Logits of one sequence (T,), and N and R of each position, a position at a time, by the model's weights."""
    core, o = model.model.core, model.config.options
    s = model.model.embed_tokens.weight[ids]
    T, h = s.shape
    s = s * math.sqrt(h) if o.scale_embedding else s
    running, total, out = [True] * T, [0.0] * T, [0.0] * T
    steps, remainder = [0] * T, [0.0] * T
    for t in range(1, o.universal.max_steps + 1):
        x = s + torch.tensor([embedding_of_place(first + pos, t, h) for pos in range(T)], dtype=s.dtype)
        p = torch.sigmoid((x * core.halting.weight).sum(-1) + core.halting.bias)
        for block in core.layers:
            a = norm(x + attend(x, block.mixer), block.mixer_norm)
            new = x = norm(a + feed_forward(a, block.mlp), block.mlp_norm)
        states = []
        for i in range(T):
            states.append(new[i] if running[i] else s[i])
            if not running[i]:
                continue
            steps[i] += 1
            if total[i] + p[i] > 1 - o.universal.epsilon or t == o.universal.max_steps:
                running[i], remainder[i] = False, 1 - total[i]
                out[i] = out[i] + remainder[i] * new[i]
            else:
                total[i] = total[i] + p[i]
                out[i] = out[i] + p[i] * new[i]
        s = torch.stack(states)
    logits = norm(torch.stack(out), model.model.norm) @ model.lm_head.weight.T
    return logits, steps, remainder


def test_logits_steps_and_gradients_are_those_of_the_definition():
    scaled = {"scale_embedding": True}
    model = build(options("attention", "attention", ponder_weight=0.1, epsilon=0.1, model=scaled)).train()
    ids = tokens(2, 15)
    model.zero_grad()
    out = model(ids, targets=ids.flip(1))
    out.loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses, all_steps = [], []
    for row, targets in zip(ids, ids.flip(1)):
        logits, steps, remainder = by_definition(model, row)
        all_steps += steps
        losses.append(F.cross_entropy(logits, targets) + 0.1 * sum(n + r for n, r in zip(steps, remainder)) / len(row))
    assert set(all_steps) == {1, 2, 3, 4}
    loss = torch.stack(losses).mean()
    assert_close(out.loss, loss)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 0, name
        assert_close(got[name], p.grad, 1e-8)


def test_a_halted_position_stays_and_is_still_attended_to():
    """Its keys at later steps are those of its last state, not of what it would have become."""
    model, ids = build(options("attention", epsilon=0.1)), tokens(1, 15)
    core = model.model.core
    kept: list[torch.Tensor] = []
    core.layers[0].register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0][0]))
    model(ids, use_cache=True)
    clock = sinusoids(torch.arange(1, STEPS + 1), kept[0])
    states = [x - clock[t] for t, x in enumerate(kept)]  # s_0 … s_3, with the places
    steps = torch.tensor(by_definition(model, ids[0])[1])
    for t in range(1, STEPS):
        halted = steps < t
        assert torch.allclose(states[t][halted], states[t - 1][halted])
        assert not torch.isclose(states[t][~halted], states[t - 1][~halted]).any(dim=1).all()
    assert (steps == 1).any() and (steps > 2).any()


def test_sinusoids_by_the_formula():
    for h in (8, 7):
        like = torch.zeros(h, dtype=torch.float64)
        found = sinusoids(torch.tensor([[0, 3], [500, 1]]), like)[..., None, :] + sinusoids(torch.arange(1, 3), like)
        expected = [[[embedding_of_place(pos, t, h) for t in (1, 2)] for pos in row] for row in ((0, 3), (500, 1))]
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


# decoding and packing, as of other models


@torch.no_grad()
def in_calls(model: RiverrunForCausalLM, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = model.make_cache()
    return torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)], dim=1)


@every_shape
@pytest.mark.parametrize("split", SPLITS)
def test_prefill_and_steps_equal_the_full_forward(shape, split):
    model, ids = build(shape), tokens(2, 26)
    assert_close(in_calls(model, ids, SPLITS[split]), model(ids).logits.detach())


def test_the_shapes_halt_at_various_steps():
    for shape in ("attention", "two layers, pre-norm, rotary", "hybrid"):
        assert len(costs(build(shape), tokens(2, 26)).floor().unique()) > 1, shape


@every_shape
def test_packed_documents_equal_separate_rows(shape):
    model, ids = build(shape), tokens(2, 20)
    bounds = [0, 1, 8, 20, 33, 40]
    packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).logits.flatten(0, 1)
    for start, stop in itertools.pairwise(bounds):
        assert_close(packed[start:stop], model(ids.flatten()[None, start:stop]).logits[0])


@every_shape
def test_left_padded_rows_equal_unpadded_ones(shape):
    model, lengths, ids = build(shape), [12, 7, 1], tokens(3, 12)
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    out = model(ids, attention_mask=mask, use_cache=True)
    new = tokens(3, 1)
    stepped = model(new, attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=out.past_key_values).logits
    for row, n in enumerate(lengths):
        alone = model(torch.cat([ids[row, 12 - n :], new[row]])[None]).logits[0]
        assert_close(torch.cat([out.logits, stepped], 1)[row, 12 - n :], alone)


@every_shape
def test_state_bytes_are_those_of_the_cache(shape):
    model = build(shape, torch.float32).bfloat16()
    cache = model(tokens(3, 7), use_cache=True).past_key_values
    assert cache.num_bytes() == 3 * model.state_bytes(7)


def test_generate_and_beams():
    model, prompt = build("hybrid"), tokens(2, 5)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got, expected = model.generate(prompt, **settings), prompt
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, expected)
    cached, plain = (model.generate(prompt, num_beams=3, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


# the loop


def calls(model: RiverrunForCausalLM, **given) -> int:
    """How often the shared block ran."""
    count = []
    handle = model.model.core.layers[0].register_forward_pre_hook(lambda *_: count.append(1))
    model(tokens(2, 5), **given)
    handle.remove()
    return len(count)


def test_the_loop_ends_when_all_have_halted():
    model = build("attention")
    assert calls(build("without halting")) == STEPS
    with torch.no_grad():
        model.model.core.halting.weight.zero_()
        for bias, steps in ((20.0, 1), (0.5, 2), (-1.0, 4)):  # p = 1, 0.62, 0.27
            model.model.core.halting.bias.fill_(bias)
            assert calls(model) == steps
            assert costs(model, tokens(2, 5)).floor().unique().item() in (steps, steps + 1)  # R = 1 of one step
            assert calls(model, use_cache=True) == STEPS, "later tokens read what further steps leave"


def test_the_mean_of_the_states_is_left_and_not_the_last():
    model, ids = build("attention"), tokens(1, 3)
    core = model.model.core
    with torch.no_grad():
        core.halting.weight.zero_()
        core.halting.bias.fill_(math.log(0.6 / 0.4))
    states, outs = [], []
    core.layers[0].register_forward_hook(lambda block, inputs, out: states.append(out))
    core.register_forward_hook(lambda module, inputs, out: outs.append(out[0]))
    model(ids)
    assert len(states) == 2
    assert_close(outs[0], 0.6 * states[0] + 0.4 * states[1])


@every_shape
def test_recompute_changes_no_gradient(shape):
    model, found = build(shape, torch.float32).train(), []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        assert calls(model.eval()) == calls(model.train())
        model(tokens(2, 13), targets=tokens(2, 13).flip(1)).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad.abs().max() > 0 or (shape == "one step" and "halting" in name), name
        assert torch.equal(grad, found[1][name]), name


# losses and counts


def test_pondering_costs_what_its_weight_says():
    ids, targets = tokens(2, 12), tokens(2, 12).flip(1)
    targets[0, :5] = -100
    free, dear = (build(options("attention", ponder_weight=w)).train() for w in (0.0, 0.5))
    asked = costs(dear, ids)[targets != -100]
    assert_close(dear(ids, targets=targets).loss - free(ids, targets=targets).loss, 0.5 * asked.mean(), 1e-6)
    by_number = dear(ids, targets=targets, num_targets=7).loss
    assert_close(by_number, dear(ids, targets=targets).loss * 19 / 7)
    assert_close(dear(ids, targets=targets).cross_entropy, free(ids, targets=targets).cross_entropy)
    losses = [model.train(training)(ids, labels=ids).loss for model in (dear, free) for training in (True, False)]
    assert losses[0] > losses[1] + 0.5 and losses[1] == losses[2] == losses[3]


def test_losses_of_single_predictions_leave_pondering_out():
    ids = tokens(1, 4)
    model = build("attention")
    assert model(ids, targets=ids, token_losses=True).token_losses.shape == ids.shape
    with pytest.raises(ValueError, match=r"set model\.universal\.ponder_weight=0"):
        model.train()(ids, targets=ids, token_losses=True)
    build(options("attention", ponder_weight=0.0)).train()(ids, targets=ids, token_losses=True)


def test_training_tells_how_long_positions_ponder():
    model, ids = build("attention"), tokens(2, 12)
    take_noted()
    model(ids)
    assert take_noted() == {}
    expected = costs(model, ids)
    model.train()(ids)
    found = {name: total / count for name, (total, count) in take_noted().items()}
    assert set(found) == {"halting_steps", "halting_remainder"}
    assert sum(found.values()) == pytest.approx(expected.mean().item())
    assert 1 < found["halting_steps"] <= STEPS and 0 < found["halting_remainder"] <= 1


@every_shape
def test_flops_are_those_of_all_steps(shape):
    model, steps = build(shape), SHAPES[shape].universal.max_steps
    once = replace(SHAPES[shape], universal=replace(SHAPES[shape].universal, max_steps=1))
    head = 2 * model.lm_head.weight.numel()
    assert model.flops_per_token(64) - head == pytest.approx(steps * (build(once).flops_per_token(64) - head))


def test_it_learns_to_copy():
    """Six digits: a guess is right once in a million times. Positions that cost nothing ponder longer."""
    steps = []
    for weight in (0.0, 0.1):
        chosen = ModelOptions(
            vocab_size=11, hidden_size=64, num_hidden_layers=1, layer_pattern=("attention",), scale_embedding=True,
            initializer="takase", universal=UniversalOptions(max_steps=3, ponder_weight=weight),
        )  # fmt: skip
        torch.manual_seed(0)
        model = RiverrunForCausalLM(RiverrunConfig.from_options(chosen)).train()
        adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)

        def copying(rows: int):
            x = torch.randint(0, 10, (rows, 6))
            ids = torch.cat([x, torch.full((rows, 1), 10), x[:, :-1]], dim=1)
            return ids, F.pad(x, (6, 0), value=-100)

        for step in range(150):
            adam.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 30)
            ids, targets = copying(64)
            model(ids, targets=targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
        ids, targets = copying(200)
        predicted = model.eval()(ids).logits.argmax(-1)
        assert (predicted == targets)[:, 6:].all(1).float().mean() > 0.95
        steps.append(costs(model, ids)[:, 6:].mean())
    assert steps[1] < steps[0]


# random offsets


def test_offsets_shift_the_places_of_training_rows():
    model, ids = build(options("attention", random_offset=50)), tokens(2, 9)
    keys = torch.tensor([5, 2**62 + 6])
    shift = offsets(keys, 50)
    assert len(set(shift.tolist())) == 2
    assert_close(model(ids, row_keys=keys).logits, build("attention")(ids).logits)
    logits = model.train()(ids, row_keys=keys).logits
    for row in range(2):
        assert_close(logits[row], by_definition(model, ids[row], int(shift[row]))[0])
    with pytest.raises(ValueError, match="give row_keys, or set it to 0"):
        model(ids)


def test_offsets_spread_evenly():
    for first in (0, 12345, 2**63 - 2000):
        found = offsets(first + torch.arange(1100), 10)
        assert torch.equal(found.unique(), torch.arange(11))
        assert all(abs(n - 100) <= 5 for n in found.bincount().tolist())
        few = offsets(first + torch.arange(11), 10)
        assert len(few.unique()) >= 7, "of neighbours as well"
    assert not offsets(torch.arange(50), 0).any()


# options


def test_saved_configs():
    chosen = options("attention", halting="none", random_offset=3)
    config = RiverrunConfig.from_options(chosen)
    assert config.options.universal == chosen.universal and config.model["universal"]["random_offset"] == 3
    assert RiverrunConfig(model=config.model).options == config.options
    assert "universal" not in RiverrunConfig.from_options(BASE).model


def test_positions_decide_about_rotary_ones():
    for positions, rope in (("sinusoidal", False), ("none", False), ("rotary", True)):
        for given in (True, False):
            chosen = options("attention", positions=positions, model={"attention": replace(BASE.attention, rope=given)})
            assert chosen.resolve().attention.rope == rope


@pytest.mark.parametrize(
    "universal, model, message",
    [
        ({"max_steps": 0}, {}, "universal.max_steps=0 must be at least 1"),
        ({"epsilon": 1.0}, {}, r"universal.epsilon=1.0 must be in \[0, 1\)"),
        ({"ponder_weight": -1.0}, {}, "universal.ponder_weight=-1.0 must not be negative"),
        ({"random_offset": -1}, {}, "universal.random_offset=-1 must not be negative"),
        ({"random_offset": 8, "positions": "rotary"}, {}, "universal.positions='rotary' has none: set it to 0"),
        ({"halting": "ACT"}, {}, "universal.halting='ACT' is unknown; choose from act, none"),
        ({}, {"post_norm_attention": True}, "universal.norm='post' has norms of its own: set sandwich_norm and"),
        ({}, {"sandwich_norm": True}, "or universal.norm='pre'"),
    ],
)
def test_what_is_impossible_is_told(universal, model, message):
    with pytest.raises(ValueError, match=message):
        build(options("attention", model=model, **universal))


def test_one_way_to_run_layers_several_times():
    from riverrun.modeling.depth.options import DepthOptions

    both = options("attention", "attention", "attention", model={"depth": DepthOptions(1, 1)})
    with pytest.raises(ValueError, match="two ways to run layers several times: set one of them"):
        build(both)


def test_what_needs_other_states_is_refused():
    model, ids = build("attention"), tokens(1, 4)
    with pytest.raises(ValueError, match=r"set train\.state_passing\.mode='off'"):
        model.train()(ids, targets=ids, states=[{}])
    with pytest.raises(ValueError, match=r"states for each step: model\.make_cache\(\)"):
        model(ids, past_key_values=RiverrunCache(model.config.num_hidden_layers))
    with pytest.raises(ValueError, match="leave slots out"):
        model.make_cache(slots=1)
    with pytest.raises(ValueError, match="num_steps"):
        model(ids, num_steps=2)
