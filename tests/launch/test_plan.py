"""`riverrun plan`: memory counted against hand counts, real runs and whole traces; layouts; the command."""

import json
from contextlib import nullcontext
from functools import partial
from math import prod

import pytest
import torch
from typer.testing import CliRunner

from riverrun.launch import cli, footprint, memory, plan, shipped
from riverrun.launch.memory import GIB, Layout
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.layout import Layout as Rows
from riverrun.modeling.mixer_options import AttentionOptions, Mamba2Options
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.sharding import meta_model, shard_shapes
from riverrun.train.config import Recipe

BF16 = torch.bfloat16


def options(*mixers, **changes):
    sizes = {"vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": len(mixers), "intermediate_size": 1024}
    return ModelOptions(**sizes | {"layer_pattern": mixers, **changes}).resolve()


def recipe(*mixers, seq_len=1024, **changes):
    made = Recipe(model=options(*mixers, **changes))
    return made.model_copy(update={"data": made.data.model_copy(update={"seq_len": seq_len})})


def cluster(gpus, gpu="h200", node_size=8):
    return plan.Cluster(plan.GPUS[gpu], gpus, node_size)


def invoke(*args):
    return CliRunner().invoke(cli.app, ["plan", *args], env={"COLUMNS": "200", "TERM": "dumb"})


# memory


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_add_up(stage, recompute):
    found = memory.predict(recipe("mamba2", "attention"), Layout(dp=4, zero_stage=stage, recompute=recompute))
    assert found.allocated == pytest.approx(sum(found.parts.values())) and found.total > found.allocated
    assert found.total == pytest.approx(found.allocated + found.outside)
    assert all(part >= 0 for part in found.parts.values()), found


@pytest.mark.parametrize("tp", [1, 2])
def test_parameters_are_those_of_the_shards(tp):
    model = options("mamba2", "para_lstm", "attention")
    shapes = shard_shapes(RiverrunConfig.from_options(model), tp)
    held = memory.parameters(model, tp)
    assert held.numel == sum(shape.numel() for shape in shapes.values())
    heads = 2 * 512 // model.mamba2.head_dim
    assert held.fp32 == 3 * heads / tp  # A_log, dt_bias and D of the Mamba-2 layer
    assert held.largest == 2 * 512 * 1024 // 2 // tp == held.embedding


def test_saved_activations_of_an_attention_block_by_hand():
    D, F, H = 512, 1024, 8
    plain = options("attention", attention=AttentionOptions(rope=False))
    found = footprint.block_footprint(plain, "attention", 1, BF16)
    a_token = (
        2 * D + 4  # the block's input and its norm's root mean square
        + 2 * D  # normed, for the projections
        + 3 * 2 * D + 2 * D + 4 * H  # q, k and v; the output, and the softmax's log-sum-exp
        + 2 * D + 4 + 2 * D  # the residual stream between the sublayers, and normed
        + 4 * 2 * F  # gate, its SiLU, up and their product
    )  # fmt: skip
    assert found.saved(4096) == 4096 * a_token
    assert found.entered(4096) == 4096 * 2 * D


@pytest.mark.parametrize("mixer", ["mamba2", "gated_delta", "para_gru"])
def test_what_a_real_block_saves_on_the_cpu(mixer, monkeypatch):
    monkeypatch.setattr(footprint, "_AsOnCuda", nullcontext)
    sizes, T = options(mixer, hidden_size=128, intermediate_size=256), footprint.TOKENS
    with footprint._fakes():
        fake = footprint._shard(sizes, 1, torch.float32).model.layers[0]
        layout = footprint._layout(sizes, 2, T, torch.float32)
        counted = footprint._run(partial(fake, layout=layout), (2, T, 128), torch.float32)[2]

    block = RiverrunForCausalLM(RiverrunConfig.from_options(sizes)).model.layers[0]
    ours = {p.untyped_storage().data_ptr() for p in block.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x = torch.randn(2, T, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, Rows.of_rows((2, T), torch.zeros(2, dtype=torch.int64)))
    measured = sum(storage.nbytes() for at, storage in saved.items() if at not in ours)
    assert counted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_blocks_put_together_peak_where_the_whole_model_does(tied):
    shape = options("mamba2", "para_gru", "mamba2", tie_word_embeddings=tied)
    rows, T = 2, footprint.TOKENS
    with footprint._fakes():
        model = footprint._shard(shape, 1, BF16)
        ids = torch.zeros(rows, T, dtype=torch.int64)
        with footprint._AsOnCuda(), footprint._Recorder() as recorder:
            model(input_ids=ids, targets=ids).loss.backward()
            whole = max(a + b for a, b in zip(recorder.alive, recorder.inside))
    made = recipe("mamba2", "para_gru", "mamba2", seq_len=T, tie_word_embeddings=tied)
    found = memory.predict(made, Layout(micro_batch=rows)).parts
    ours = found["activations"] + found["working"] + found["states"] + found["loss"]
    assert ours == pytest.approx(whole, rel=0.05)


def test_zero_divides_what_it_says():
    made = recipe("attention")
    P = memory.parameters(made.model, 1).numel
    for stage, weights, gradients in ((1, 2 * P, 4 * P), (2, 2 * P, P), (3, P / 2, P)):
        found = memory.predict(made, Layout(dp=2, cp=2, zero_stage=stage, micro_batch=8))
        assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, 3 * P)
    reduction = [m for m in memory.moments(made, Layout()) if m.moment == "reduction of the gradients"]
    assert [m.exchange for m in reduction] == [4 * P]


def test_muon_has_one_moment():
    made = recipe("attention")
    muon = made.model_copy(update={"optimizer": made.optimizer.model_copy(update={"name": "muon"})})
    hidden = memory.parameters(made.model, 1, True).muon
    assert hidden == 4 * 512**2 + 3 * 512 * 1024
    optimizers = [memory.predict(each, Layout(micro_batch=8)).optimizer for each in (made, muon)]
    assert optimizers[0] - optimizers[1] == 4 * hidden


def test_states_that_rows_pass_on_are_counted():
    """A row's, of every row of a step on one rank; convolutions' tails, a small part, are wider than in decoding."""
    made = recipe("mamba2", "para_gru", "attention")
    passing = made.train.state_passing.model_copy(update={"mode": "passing"})
    train = made.train.model_copy(update={"state_passing": passing, "global_batch_size": 64})
    model = RiverrunForCausalLM(RiverrunConfig.from_options(made.model))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    kept = model(ids, targets=ids, states=[{}, {}, {}]).states
    row = 4 * sum(state.numel() for layer in kept for state in layer.values())
    found = memory.predict(made.model_copy(update={"train": train}), Layout(dp=4))
    assert found.carried == pytest.approx(64 / 4 * row, rel=0.03)
    assert memory.predict(made, Layout(dp=4)).carried == 0


def test_tensor_and_context_parallel_ranks_share():
    made = recipe("para_gru", "mamba2", mamba2=Mamba2Options(num_groups=2))
    alone, context, tensor = (
        memory.predict(made, Layout(micro_batch=16, cp=cp, tp=tp)) for cp, tp in ((1, 1), (2, 1), (1, 2))
    )
    assert context.activations == pytest.approx(alone.activations / 2, rel=0.01)
    assert (context.weights, context.optimizer) == (alone.weights, alone.optimizer / 2)
    assert tensor.weights == pytest.approx(alone.weights / 2, rel=0.01)
    one, two = (footprint.block_footprint(options("attention"), "attention", tp, BF16).saved(4096) for tp in (1, 2))
    assert one / 2 + 2 * 4096 * 512 <= two < 0.75 * one  # every rank gathers its two sublayers' inputs


def test_recompute_keeps_the_inputs_alone():
    found = memory.predict(recipe(*["mamba2"] * 8), Layout(micro_batch=16, recompute=True))
    kept = memory.predict(recipe(*["mamba2"] * 8), Layout(micro_batch=16))
    tokens = 16 * 1024
    assert found.activations <= 8 * tokens * 2 * 512 + 48 * tokens
    assert found.allocated < kept.allocated / 2


def test_the_loss_follows_its_line():
    sizes = options("mamba2", vocab_size=131_072)
    chunk = 512 * 2**20 // (4 * 131_072)
    long, exact = footprint.head_footprint(sizes, 1, BF16, 8 * chunk), footprint._head(sizes, 1, BF16, 8 * chunk)
    for way in ("forward", "backward"):
        assert getattr(long, way).peak(8)[0] == pytest.approx(getattr(exact, way).peak(1)[0], rel=1e-3)
        assert getattr(long, way).moved(8) == pytest.approx(getattr(exact, way).moved(1), rel=1e-3)


# time


def test_flops_are_the_models_own():
    made = shipped.load("hybrid-130m", require_inputs=False).recipe
    model = meta_model(RiverrunConfig.from_options(made.model))
    count = plan.flops(made.model, 2048)
    assert count.forward == pytest.approx(model.flops_per_token(2048)) and set(count.mixing) == set(made.model.layers)
    found = plan.estimate(made, Layout(dp=8, micro_batch=8), cluster(8))
    tokens = 256 * 2048
    assert found.tokens_per_second == pytest.approx(tokens / sum(found.seconds.values()))
    assert found.mfu == pytest.approx(3 * model.flops_per_token(2048) * found.tokens_per_second / (8 * 989e12))


def test_a_network_slows_what_goes_beyond_a_node():
    near, far = cluster(16, node_size=16), cluster(16, node_size=8)
    assert near.bandwidth(Layout(dp=16), 16, 1) == near.gpu.nvlink == far.bandwidth(Layout(dp=16), 8, 1)
    assert far.bandwidth(Layout(dp=2, tp=8), 2, 8) == pytest.approx(0.8 * 50e9)


# the search


@pytest.mark.parametrize("gpus", [8, 64])
@pytest.mark.parametrize("name", shipped.names())
def test_every_recipe_has_a_plan(name, gpus):
    made = shipped.load(name, require_inputs=False).recipe
    found = plan.search(made, cluster(gpus), {"parallel.tp": 1, "train.recompute": True})
    for each in found:
        layout = each.layout
        assert layout.gpus == gpus and each.memory.total <= plan.GPUS["h200"].memory * GIB
        assert made.train.global_batch_size % (layout.dp * layout.micro_batch) == 0
        assert made.data.seq_len % layout.cp == 0 and 0 < each.mfu < 0.7
        loaded = shipped.load(name, plan.command_line(layout).split(), require_inputs=False)
        assert Layout.of(loaded.recipe, gpus) == layout


def test_the_first_is_simple_and_near_the_fastest():
    made = recipe("para_gru", "attention")
    found = plan.search(made, cluster(4))
    assert found[0].tokens_per_second >= plan.NEAR * max(e.tokens_per_second for e in found)
    assert found[0].layout.tp == found[0].layout.cp == 1
    assert {e.layout.tp for e in found} == {1, 2, 4}
    assert all(e.layout.tp <= 2 for e in plan.search(made, cluster(4, node_size=2)))


def test_what_does_not_fit_says_how_much_is_lacking():
    made = shipped.load("hybrid-7b", require_inputs=False).recipe
    with pytest.raises(ValueError, match=r"no layout of 1 a100-80g fits.*GiB a GPU.*more than the 79.2.*--gpus"):
        plan.search(made, cluster(1, "a100-80g"), {"train.recompute": True})
    with pytest.raises(ValueError, match=r"7 GPUs cannot share.*divisor of 512"):
        plan.search(made, cluster(7))


# the command


def test_command_prints_and_writes(tmp_path):
    result = invoke(
        "quickstart", "--gpus", "2", "train.dtype=bf16", "parallel.tp=1", "--json", str(tmp_path / "p.json")
    )
    assert result.exit_code == 0, result.output
    for text in ("activations", "allowance", "GFLOPs a token", "tokens/s", "MFU", "riverrun train quickstart"):
        assert text in result.output
    written = json.loads((tmp_path / "p.json").read_text())
    assert all(prod(each["layout"][axis] for axis in ("dp", "cp", "tp")) == 2 for each in written)
    assert {each["layout"]["tp"] for each in written} == {1}  # what the command line asks for is kept


def test_command_exits_with_2_if_nothing_fits():
    result = invoke("hybrid-7b", "--gpus", "1", "--gpu", "a100-80g", "train.recompute=true", "parallel.cp=1")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no layout of 1 a100-80g fits")
    assert invoke("hybrid-7b", "--gpus", "0").exit_code == 2
