"""Titans' three blocks: against loops over tokens, in calls, packed, on ranks; and what no token may see."""

import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from riverrun.modeling import neural_memory, segmented_attention
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.layout import Layout
from riverrun.modeling.memory_options import TitansMACOptions, TitansMAGOptions, TitansMALOptions
from riverrun.modeling.mixers.titans import TitansMAG, TitansMAL
from riverrun.modeling.mixers.titans_mac import TitansMAC
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.neural_memory import NeuralMemory
from riverrun.modeling.parallel.context import Context
from riverrun.modeling.parallel.mesh import ALONE
from tests.modeling import titans_loops
from tests.modeling.parallel import sharded

HIDDEN = 6
MEMORY = {"num_heads": 2, "head_dim": 4, "expand": 2, "chunk_size": 2, "step_cap": "none", "num_persistent": 3}
MAG = TitansMAGOptions(**MEMORY, attention_window=5)
MAL = TitansMALOptions(**MEMORY, attention_window=5)
MAC = TitansMACOptions(**MEMORY, segment=4)
PLAIN = {"num_persistent": 0, "output_gate": False, "rope": False}
BLOCKS = {
    "mag": (TitansMAG, MAG),
    "mag linear": (TitansMAG, replace(MAG, depth=1, chunk_size=1, attention_window=2)),
    "mag plain": (TitansMAG, replace(MAG, **PLAIN)),
    "mal": (TitansMAL, MAL),
    "mal plain": (TitansMAL, replace(MAL, **PLAIN)),
    "mac": (TitansMAC, MAC),
    "mac linear": (TitansMAC, replace(MAC, depth=1, chunk_size=1, segment=3)),
    "mac plain": (TitansMAC, replace(MAC, **PLAIN)),
}
every_block = pytest.mark.parametrize("name", BLOCKS)
LOOPS = {TitansMAG: titans_loops.mag, TitansMAL: titans_loops.mal, TitansMAC: titans_loops.mac}
NORM_EPS = 1e-6


def build(name, dtype=torch.float64):
    """With parameters by which every part matters."""
    kind, options = BLOCKS[name]
    torch.manual_seed(0)
    block = kind(options, HIDDEN, NORM_EPS).double()
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            reset()
    with torch.no_grad():
        for path, p in block.named_parameters():
            gate = {"alpha_bias": -2.0, "theta_bias": -2.0, "eta_bias": 0.0}.get(path.rpartition(".")[2])
            if gate is not None:
                p.fill_(gate)
            elif "norm" in path:
                p.add_(0.3 * torch.randn_like(p))
    return block.to(dtype)


def draw(*shape, seed=1):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(B, T, start=0):
    return Layout.of_rows((B, T), torch.full((B,), start))


def packed(B, T, *bounds):
    return Layout.of_documents((B, T), torch.tensor(bounds, dtype=torch.int32))


def assert_equal(got, want, case=None, tolerance=1e-10):
    assert got.shape == want.shape
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error <= tolerance * (1 + scale), (case, error, scale)


@every_block
@pytest.mark.parametrize("T", [1, 2, 4, 5, 11])
def test_it_is_the_loop_over_tokens(name, T):
    """Fewer tokens than a segment, one, one more, and some: outputs, and the gradient of everything."""
    block, x = build(name), draw(T).requires_grad_()
    params = dict(block.named_parameters())
    upstream = draw(T, seed=2)
    want = LOOPS[type(block)](params, block.options, x)
    got = block(x[None], rows(1, T))[0]
    assert_equal(got, want)
    wanted, gotten = (
        torch.autograd.grad((y * upstream).sum(), [x, *params.values()], allow_unused=True) for y in (want, got)
    )
    for path, w, g in zip(["x", *params], wanted, gotten):
        if w is None:  # a key that only later tokens would see, say
            assert g is None or not g.any(), path
        else:
            assert_equal(g, w, path, 1e-9)
    if T == 11:
        assert all(w is not None and w.any() for w in wanted), "a parameter that does nothing"


@every_block
def test_the_op_is_told_which_states_are_kept(name):
    """And nothing is another without its kernels."""
    root, every, x = build(name), build(name), draw(1, 5)
    for module in every.modules():
        if isinstance(module, NeuralMemory):
            module.options = replace(module.options, keep_states="all")
    with mock.patch.object(neural_memory, "neural_memory", wraps=neural_memory.neural_memory) as op:
        want, got = (block(x, rows(1, 5)) for block in (root, every))
    told = [call.kwargs["keep"] for call in op.call_args_list]
    assert told == ["root"] * (len(told) // 2) + ["all"] * (len(told) // 2) and told
    assert torch.equal(got, want)


# calls


def in_calls(block, x, sizes):
    states, parts, start = {}, [], 0
    for part in x.split(sizes, dim=1):
        parts.append(block(part, rows(len(x), part.shape[1], start), states))
        start += part.shape[1]
    return torch.cat(parts, dim=1), states


@torch.no_grad()
@every_block
def test_any_split_into_calls_is_the_whole(name):
    block, x = build(name), draw(2, 11)
    whole = block(x, rows(2, 11))
    sizes = [[a, 11 - a] for a in range(1, 11)] + [[a, 3, 8 - a] for a in range(1, 8)] + [[1] * 11, [5, 1, 1, 4]]
    for split in sizes:
        got, states = in_calls(block, x, split)
        assert_equal(got, whole, split)
        assert states["memory_seen"].tolist() == [11, 11]


@torch.no_grad()
@every_block
def test_documents_are_rows_of_their_own(name):
    block, x = build(name), draw(2, 13)
    bounds = [0, 1, 4, 13, 22, 26]
    got, flat = block(x, packed(2, 13, *bounds)).flatten(0, 1), x.flatten(0, 1)
    for start, stop in itertools.pairwise(bounds):
        alone = block(flat[None, start:stop], rows(1, stop - start))[0]
        assert_equal(got[start:stop], alone, (start, stop))


@torch.no_grad()
@every_block
@pytest.mark.parametrize("new", [1, 2, 7])
def test_rows_that_go_on_at_different_places(name, new):
    """After documents, or padding: of each row its last sequence does."""
    block, x, more = build(name), draw(3, 10), draw(3, new, seed=2)
    states, starts = {}, [0, 3, 9]
    mask = torch.stack([torch.arange(10) >= start for start in starts])
    block(x, Layout.of_left_padded(mask), states)
    got = block(more, Layout.of_rows((3, new), torch.tensor([10, 7, 1])), states)
    for row, start in enumerate(starts):
        whole = torch.cat([x[row, start:], more[row]])
        assert_equal(got[row], block(whole[None], rows(1, len(whole)))[0, -new:], row)


@torch.no_grad()
@every_block
@pytest.mark.parametrize("first", [1, 6])
def test_states_enter_a_rows_first_document(name, first):
    """In training, where positions start anew in every call."""
    block, before, x = build(name), draw(2, 6), draw(2, 9, seed=2)
    _, states = in_calls(block, before[:, :first], [first])
    got = block(x, packed(2, 9, 0, 2, 9, 18), states)
    whole = torch.cat([before[:, :first], x], dim=1)
    assert_equal(got[0, :2], block(whole[:1, : first + 2], rows(1, first + 2))[0, first:])
    assert_equal(got[0, 2:], block(x[:1, 2:], rows(1, 7))[0])
    assert_equal(got[1], block(whole[1:], rows(1, first + 9))[0, first:])
    assert states["memory_seen"].tolist() == [7, first + 9]


@torch.no_grad()
@pytest.mark.parametrize("name", ["mag", "mal", "mac", "mac linear"])
def test_states_of_zeros_are_none(name):
    """A row that carries none begins, with the memory that sequences begin with."""
    block, x = build(name), draw(2, 7)
    _, states = in_calls(block, draw(2, 6, seed=2), [6])
    carried = torch.tensor([True, False])
    states = {key: torch.where(carried.view(-1, *[1] * (t.dim() - 1)), t, 0) for key, t in states.items()}
    assert_equal(block(x, rows(2, 7), states)[1], block(x[1:], rows(1, 7))[0])


@torch.no_grad()
@every_block
def test_states_have_one_size(name):
    block, x = build(name), draw(2, 9).float()
    sizes = set()
    for T in (1, 3, 9):
        states = {}
        block.float()(x[:, :T], rows(2, T), states)
        sizes.add(tuple((key, t.shape) for key, t in sorted(states.items())))
        halves = [t.numel() * (4 if key.startswith("memory_") else 2) for key, t in states.items()]
        assert sum(halves) == 2 * block.state_bytes(T)
    assert len(sizes) == 1


# who sees what


def earlier_changed(block, T=9):
    """Tokens j before which a change of token j changes anything; that it changes its own output is asserted."""
    x = draw(T)
    before, leaks = block(x[None], rows(1, T))[0], []
    for j in range(T):
        other = x.clone()
        other[j] += 1
        changed = (block(other[None], rows(1, T))[0] != before).any(-1)
        assert changed[j]
        leaks += [j] if changed[:j].any() else []
    return leaks


@torch.no_grad()
@every_block
def test_no_token_sees_a_later_one(name):
    assert earlier_changed(build(name)) == []


@torch.no_grad()
def test_without_the_mask_of_reads_they_would_be_seen():
    def leaky(start, queries, tokens, persistent, device):
        seen = own(start, queries, tokens, persistent, device)
        seen[..., persistent : persistent + tokens] = True
        return seen

    own = segmented_attention._seen
    with mock.patch.object(segmented_attention, "_seen", leaky):
        assert earlier_changed(build("mac"), 8) == [1, 2, 3, 5, 6, 7]


@torch.no_grad()
def test_what_a_token_of_attention_sees():
    """Without a memory's output in the way: `o_proj` of attention alone."""
    for name, window in (("mag plain", 5), ("mac plain", None)):
        block, x = build(name), draw(9)
        block.memory_output = lambda m: torch.full_like(m, 1.0)
        with mock.patch("riverrun.modeling.mixers.titans_mac.read_memory", lambda q, *_, **__: torch.ones_like(q)):
            before = block(x[None], rows(1, 9))[0]
            for j in range(9):
                other = x.clone()
                other[j] += 1
                changed = (block(other[None], rows(1, 9))[0] != before).any(-1)
                end = j + window if window else (j // 4 + 1) * 4  # of the segment
                assert changed.tolist() == [j <= t < end for t in range(9)], (name, j)


# types, ranks


@every_block
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(name, autocast):
    """Against float64 of the same rounded weights and inputs."""
    block, exact, x = build(name).bfloat16(), build(name), draw(2, 11).bfloat16()
    exact.load_state_dict(block.state_dict())
    for path, p in block.named_parameters():
        p.data = p.data.float() if autocast or path.endswith("_bias") else p.data
    want, given = exact(x.double(), rows(2, 11)), x.float() if autocast else x
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = block(given, rows(2, 11))
        got.square().mean().backward()
        with torch.no_grad():
            calls, states = in_calls(block, given, [6, 1, 4])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    for y in (got, calls):
        assert y.dtype == torch.bfloat16 and (y.double() - want).norm() < 0.05 * want.norm()
    for key, state in states.items():
        assert autocast or state.dtype == (torch.float32 if key.startswith("memory_") else torch.bfloat16), key


SHARED = MEMORY | {"num_heads": 4, "chunk_size": 4}
MODELS = {
    "titans_mag": sharded.of("titans_mag", titans_mag=TitansMAGOptions(**SHARED, attention_window=5)),
    "titans_mal": sharded.of("titans_mal", titans_mal=TitansMALOptions(**SHARED, attention_window=5)),
    "titans_mac": sharded.of("titans_mac", titans_mac=TitansMACOptions(**SHARED, segment=4)),
}


def part(*args):
    return sharded.part(*args)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_that_share_heads_compute_as_one(ranks, name, tp):
    """Documents of one, three, five, seven and sixteen tokens, in segments of four."""
    results = ranks(tp).run(part, MODELS[name], 1, tp, tp == 2, sharded.BOUNDS)
    sharded.assert_parts_make_the_whole(results, MODELS[name], 1, tp, sharded.BOUNDS)


@pytest.mark.parametrize("name", ["titans_mag", "titans_mal"])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_ranks_that_share_rows_compute_as_one(ranks, name, method):
    bounds = [0, 1, 16, 31, 32]
    results = ranks(4).run(part, MODELS[name], 4, 1, True, bounds, "auto", method)
    sharded.assert_parts_make_the_whole(results, MODELS[name], 4, 1, bounds)


def test_segments_are_not_shared():
    model = RiverrunForCausalLM(RiverrunConfig.from_options(MODELS["titans_mac"]))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"titans_mac cannot share rows among ranks .*: set parallel.cp=1"):
        model(ids, targets=ids, context=Context.of_rows(ALONE, 1, 4, [0, 4], "cpu"))


def test_flops_of_attention_are_those_of_the_visible_keys():
    for name, seen in (("mag", lambda t: min(t + 1, 5) + 3), ("mac", lambda t: 2 * (t % 4 + 1) + 3)):
        block = build(name)
        o = block.options
        for T in (3, 4, 11):
            keys = sum(map(seen, range(T))) / T
            beside = block.memory.mixing_flops(T)
            if name == "mac":  # reads of h, and queries of x
                beside += 2 * 2 * (4 * 8 + 8 * 4) + 2 * HIDDEN * 8
            assert block.mixing_flops(T) == pytest.approx(beside + 2 * 2 * o.num_heads * o.head_dim * keys)
