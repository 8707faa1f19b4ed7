"""What `riverrun plan` counts of attention in windows and of memories: against measured peaks, hand counts, and
the bytes that blocks and launchers allocate."""

from functools import partial

import pytest
import torch

from riverrun.kernels.neural_memory import triton_linear_launch, triton_linear_op, triton_mlp
from riverrun.kernels.neural_memory.triton_mlp_launch import Launch as Cut
from riverrun.launch import footprint, memory, shipped
from riverrun.launch.inside import INSIDE
from riverrun.launch.memory import GIB, Layout
from riverrun.modeling.memory_options import TitansLMMOptions, TitansMACOptions, TitansMAGOptions, TitansMALOptions
from riverrun.modeling.mixer_options import AttentionOptions
from riverrun.modeling.persistent_attention import persistent_attention
from tests.launch.test_plan import BF16, options

MEMORIES = {
    "titans_lmm": TitansLMMOptions(head_dim=64, chunk_size=64),
    "titans_mag": TitansMAGOptions(head_dim=64, chunk_size=64, attention_window=128),
    "titans_mal": TitansMALOptions(head_dim=64, chunk_size=64, attention_window=128),
    "titans_mac": TitansMACOptions(head_dim=64, chunk_size=64, segment=256),
}


@pytest.mark.parametrize(
    ("name", "changes", "gpus", "measured"),
    [
        ("titans-mag-760m", {"micro_batch_size": 8, "recompute": True, "seq_len": 8192}, 1, 26.3),
        ("mamba2-1.3b", {"micro_batch_size": 8, "recompute": False, "seq_len": 4096}, 1, 98.1),
        ("mamba2-1.3b", {"micro_batch_size": 8, "recompute": True, "seq_len": 4096}, 1, 31.5),
        ("para-gru-1b", {"micro_batch_size": 8, "recompute": False, "seq_len": 4096}, 1, 70.6),
        ("para-gru-1b", {"micro_batch_size": 8, "recompute": True, "seq_len": 4096}, 1, 22.5),
        ("gated-delta-product-1.3b", {"micro_batch_size": 8, "recompute": False, "seq_len": 4096}, 1, 92.9),
        ("riverrun-1b", {"micro_batch_size": 8, "recompute": False, "seq_len": 4096}, 1, 66.7),
        ("para-lstm-7b", {"micro_batch_size": 2, "recompute": False, "seq_len": 2048}, 2, 103.2),
        ("hybrid-7b", {"micro_batch_size": 2, "recompute": False, "seq_len": 8192, "tp": 2}, 2, 117.5),
    ],
)
def test_peaks_on_h200s(name, changes, gpus, measured):
    """GiB that torch had allocated at the peak, of packed documents (docs/benchmarks.md, docs/neural-memory.md)."""
    sections = {"micro_batch_size": "train", "recompute": "train", "seq_len": "data", "tp": "parallel"}
    overrides = [f"{sections[key]}.{key}={str(value).lower()}" for key, value in changes.items()]
    rows = gpus // changes.get("tp", 1) * changes["micro_batch_size"]
    made = shipped.load(name, [*overrides, f"train.global_batch_size={rows}"], require_inputs=False).recipe
    found = memory.predict(made, Layout.of(made, gpus))
    assert found.allocated / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("mixer", MEMORIES)
def test_a_memorys_rows_are_as_long_as_the_recipes(mixer, dtype):
    """Five rows of 2,048 tokens, run as they are: what they keep grows with rows, and with the root of their length."""
    shape, rows, T = options(mixer, **{mixer: MEMORIES[mixer]}), 5, 2048
    found = footprint.block_footprint(shape, mixer, 1, dtype, T)
    assert found.row == T
    with footprint._fakes():
        block, layout = footprint._shard(shape, 1, dtype).model.layers[0], footprint._layout(shape, rows, T, dtype)
        forward, backward, kept = footprint._run(partial(block, layout=layout), (rows, T, shape.hidden_size), dtype)
    assert found.saved(rows * T) == pytest.approx(kept, rel=0.02)  # all rows have a whole number of groups of chunks
    for ours, (alive, inside, _) in ((found.forward, forward), (found.backward, backward)):
        assert ours.peak(rows)[0] == pytest.approx(max(a + b for a, b in zip(alive, inside)), rel=0.02)


def test_a_memory_in_a_loop_of_torchs_is_traced_in_short_rows():
    shape = options("titans_lmm", titans_lmm=TitansLMMOptions(head_dim=64, chunk_size=16, gates="channel"))
    assert footprint.block_footprint(shape, "titans_lmm", 1, BF16, 4096).row == footprint.TOKENS


def test_a_window_takes_what_whole_attention_does():
    whole, windowed = (
        footprint.block_footprint(options("attention", attention=AttentionOptions(window=window)), "attention", 1, BF16)
        for window in (None, 128)
    )
    assert windowed.saved(4096) == whole.saved(4096)
    for one, other in ((whole.forward, windowed.forward), (whole.backward, windowed.backward)):
        assert other.peak(8)[0] == pytest.approx(one.peak(8)[0], rel=0.02)


@pytest.mark.parametrize("window", [None, 64])
def test_attention_beside_persistent_keys_by_hand(window):
    """In bf16 but for the two blocks' sums: the scores, (T, T) a head, are nowhere."""
    B, T, H, d = 2, 1024, 8, 64
    with footprint._fakes():
        keys, values = (torch.empty(H, 4, d, dtype=BF16) for _ in range(2))

        def attention(x):
            q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
            return persistent_attention(q, k, v, keys, values, window, None, T).transpose(1, 2).flatten(2)

        forward, backward, kept = footprint._run(attention, (B, T, 3, H, d), BF16)
    tokens, D = B * T, H * d
    assert kept == tokens * ((6 + 2) * D + 4 * H)  # q, k, v and the output; log_z
    # q, k, v; the output in float32, what persistent keys add, in bf16 and scaled
    assert max(forward[0]) == pytest.approx(tokens * (6 + 4 + 2 + 4) * D, rel=0.03)
    # saved, and its gradient; k's and v's, q's in float32, the persistent keys' part of that, and the kernel's sum
    peak = max(a + b for a, b in zip(*backward[:2]))
    assert peak == pytest.approx(tokens * (8 + 2 + 4 + 4 + 2 + 4) * D, rel=0.03)


@pytest.mark.parametrize("recompute", [True, False])
def test_the_states_of_all_chunks_by_hand(recompute):
    """Those of all layers, or under recompute of one at a time."""
    rows, T, H, D, F, C, layers, found = 2, 4096, 16, 96, 384, 64, 24, {}
    for keep in ("root", "all"):
        changes = [f"model.titans_mag.keep_states={keep}", f"train.recompute={str(recompute).lower()}"]
        changes += [f"train.{size}_batch_size={rows}" for size in ("micro", "global")]
        made = shipped.load("titans-mag-760m", changes, require_inputs=False).recipe
        found[keep] = {moment.moment: moment.allocated for moment in memory.moments(made, Layout.of(made, 1))}
    state, chunks = 2 * F * (D + D), rows * T // C
    of_chunk = 2 * state + (2 + 4) * C * D
    more = H * (chunks * of_chunk - chunks // 8 * 4 * state)
    again = rows * H * 8 * of_chunk + 128 * C * D * 4  # a group's, and what 128 programs leave to be summed
    for layer in range(layers):
        name = f"backward of block {layer} (titans_mag)"
        count = 1 if recompute else layer + 1
        assert count * more - again <= found["all"][name] - found["root"][name] <= count * more
    name = "backward of the loss"
    assert found["all"][name] - found["root"][name] == pytest.approx(0 if recompute else layers * more)


class _Idle:
    """A kernel that does nothing, on any grid."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


def _most(recorder, name, run, *args):
    """Its outputs; bytes that were alive at once during the run and not after it; and what we say."""
    recorder.begin()
    outputs = run()
    freed = max(recorder.alive) - recorder.live
    return outputs, freed, INSIDE[name](*args)


@pytest.mark.parametrize("keep", ["root", "all"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("T", [256, 4096])
def test_inside_a_two_layer_memory(T, norm, keep, monkeypatch):
    """What its launchers allocate and free, counted from the operators' arguments, is what they allocate and free."""
    for name in ("of_teams", "of_group"):
        monkeypatch.setattr(Cut, name, lambda *args, **options: lambda *group: args)  # which it holds
    monkeypatch.setattr(triton_mlp, "output_gradients_kernel", _Idle())
    (B, H, D, F, C, P), empty = (2, 2, 64, 256, 64, 2), partial(torch.empty, dtype=torch.float32)
    with footprint._fakes(), footprint._Recorder() as recorder:
        q, k, v, grad_o = (empty(B, T, H, D, dtype=BF16) for _ in range(4))
        M = B * T // C
        gates = [empty(M, H, *shape) for shape in ((P, C), (C, C), (3,), (P, C)) * 2]
        initial, gain = empty(B, H, P, 2 * F * D), empty(H, D) if norm else None

        given, options = (q, k, v, *gates, gain, initial), (None, False, True, keep, T)
        run = partial(triton_mlp.walk, q, k, v, gates, gain, initial, *options)
        (_, _, *saved), freed, ours = _most(recorder, "neural_memory_mlp_triton", run, *given, *options)
        assert ours == pytest.approx(freed, rel=0.01)
        run = partial(triton_mlp.walk_back, grad_o, None, q, k, v, gates, gain, initial, *saved, *options)
        args = grad_o, None, *given, *saved, *options
        _, freed, ours = _most(recorder, "neural_memory_mlp_triton_backward", run, *args)
        assert ours == pytest.approx(freed, rel=0.01)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
def test_inside_a_linear_memory(momentum, online, save, monkeypatch):
    for name in ("prepare", "forward", "backward", "within", "gradients"):
        monkeypatch.setattr(triton_linear_launch, f"{name}_kernel", _Idle())
    (B, T, H, D, C), empty = (2, 1024, 2, 64, 64), partial(torch.empty, dtype=torch.float32)
    with footprint._fakes(), footprint._Recorder() as recorder:
        q, k, v, grad_o = (empty(B, T, H, D, dtype=BF16) for _ in range(4))
        M = B * T // C
        gates = [empty(M, H, C), empty(M, H, C, C)]
        gates += [empty(M, H, C), empty(M, H), empty(M, H, C)] if momentum else [None] * 3
        given = (q, k, v, *gates, empty(B, H, D, D), None, None)
        options = (C, online, False)
        run = partial(triton_linear_op._forward._function, *given, *options, save)
        (_, _, _, *saved), freed, ours = _most(recorder, "linear_memory_triton", run, *given, *options, save)
        assert ours == pytest.approx(freed, rel=0.01)
        args = (grad_o, None, None, *given, *saved, *options)
        run = partial(triton_linear_op._backward._function, *args)
        _, freed, ours = _most(recorder, "linear_memory_triton_backward", run, *args)
        assert ours == pytest.approx(freed, rel=0.01)
