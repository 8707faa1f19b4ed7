"""`riverrun plan` of layers that run several times: FLOPs against the model's, memory against whole traces, time."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from riverrun.launch import cli, footprint, memory, passes, plan, shipped
from riverrun.launch.memory import Layout
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.options import DepthOptions
from riverrun.modeling.depth.universal_options import UniversalOptions
from riverrun.modeling.parallel.sharding import meta_model
from tests.launch.test_plan import BF16, cluster, options, recipe

DEPTH = DepthOptions(prelude_layers=1, coda_layers=1, mean_recurrence=8, backprop_depth=4)
CORE = ("attention", "mamba2", "attention", "mamba2")


def model_of(made):
    return meta_model(RiverrunConfig.from_options(made))


def stand_in(module, name):
    """What is computed again during the backward pass finds itself outside of the stand-ins for CUDA."""
    function = getattr(module, name)

    def inside(*args):
        with footprint._AsOnCuda():
            return function(*args)

    setattr(module, name, inside)


def test_training_flops_by_hand():
    """2 (N₁ + (E[n] + E[k]) N_R) + 4 (N₁ + E[k] N_R), and what mixers do alike; counts of 2 M draws."""
    made = options(*["attention"] * 4, hidden_size=512, depth=DEPTH)
    h, ffn, V, T = 512, 1024, 1024, 64
    layer, attention = 4 * h * h + 3 * h * ffn, 2 * (T + 1) * h  # scores and values of all tokens before, on average
    n, k = 5.13, 3.86
    once, iteration = (
        2 * layer + V * h + h * h,
        2 * layer + h * h,
    )  # the injection's half that sees e alone, and the other
    forward = 2 * once + 2 * attention + (n + k) * (2 * iteration + 2 * attention)
    backward = 4 * once + 4 * attention + k * (4 * iteration + 4 * attention)
    assert model_of(made).training_flops_per_token(T) == pytest.approx(forward + backward, rel=2e-3)
    deepest = model_of(made).training_flops_per_token(T, (30, 4))
    assert deepest > 2 * model_of(made).training_flops_per_token(T, (1, 3))


@pytest.mark.parametrize("changes", [{}, {"depth": DEPTH}, {"universal": UniversalOptions(max_steps=3)}])
def test_what_is_planned_is_what_the_model_counts(changes):
    made = options(*CORE, **changes)
    model, count, head = model_of(made), plan.flops(made, 256), 2.0 * 1024 * 512
    assert count.training == pytest.approx(model.training_flops_per_token(256))
    assert count.forward == pytest.approx(model.flops_per_token(256))
    parts = passes.work(made, 256)
    total = sum((p.matrices + p.mixing) * (p.passes.forward + 2 * p.passes.backward) for p in parts)
    assert total + 3 * head == pytest.approx(count.training)
    again = sum(p.matrices * (p.passes.ways(True)[0] - p.passes.ways(False)[0]) for p in parts)
    graded = 3.8625 if "depth" in changes else 3 if changes else 1
    layers = [p.matrices for p in parts if p.mixer]
    injection = sum(p.matrices for p in parts if p.mixer is None) / 2 * graded
    core = sum(layers) if "universal" in changes else sum(layers[1:3])
    assert again == pytest.approx(sum(layers) - core + graded * core + injection, rel=1e-4)


@pytest.mark.parametrize(
    ("injection", "n", "recompute"), [("linear", 0, True), ("linear", 5, False), ("diagonal", 5, True)]
)
def test_iterations_put_together_peak_where_the_whole_model_does(injection, n, recompute):
    """The most iterations that can have a gradient; those without it add nothing."""
    shape = options(*CORE, sandwich_norm=True, depth=replace(DEPTH, injection=injection))
    rows, T = 2, footprint.TOKENS
    with footprint._fakes():
        model = footprint._shard(shape, 1, BF16)
        model.set_recompute(recompute)
        stand_in(model.model.core, "advance")
        for block in (*model.model.prelude, *model.model.coda):
            stand_in(block, "forward")
        ids = torch.zeros(rows, T, dtype=torch.int64)
        with footprint._AsOnCuda(), footprint._Recorder() as recorder:
            model(input_ids=ids, targets=ids, num_steps=(n, 4)).loss.backward()
            whole = max(a + b for a, b in zip(recorder.alive, recorder.inside))
    made = recipe(*CORE, seq_len=T, sandwich_norm=True, depth=shape.depth)
    found = memory.predict(made, Layout(micro_batch=rows, recompute=recompute)).parts
    ours = found["activations"] + found["working"] + found["states"] + found["loss"]
    assert ours == pytest.approx(whole, rel=0.05)


def predicted(recompute=True, **depth):
    made = recipe(*CORE, depth=replace(DEPTH, **depth))
    return memory.predict(made, Layout(micro_batch=16, recompute=recompute))


def test_graded_iterations_decide_about_memory():
    """Under recompute each keeps a state; the mean depth beyond them is free."""
    tokens = 16 * 1024
    few, many = predicted(), predicted(backprop_depth=8)
    assert many.activations - few.activations == 4 * tokens * 2 * 512
    assert predicted(mean_recurrence=64) == few
    assert predicted(recompute=False, backprop_depth=8).activations > 1.4 * predicted(recompute=False).activations
    once = predicted(mean_recurrence=1, backprop_depth=8, sampling="fixed")  # fewer iterations than can backpropagate
    assert once.activations < few.activations - 2 * tokens * 2 * 512


def test_gradients_of_repeated_weights_wait_for_each_other():
    made = recipe(*CORE, depth=DEPTH)
    repeated = memory.parameters(made.model, 1).repeated
    assert repeated == sum(p.numel() for p in model_of(made.model).model.core.parameters())
    layout = Layout(micro_batch=1, recompute=True)
    of = {m.moment: m for m in memory.moments(made, layout)}
    alone = recipe(*CORE, depth=replace(DEPTH, backprop_depth=1))
    of_one = {m.moment: m for m in memory.moments(alone, layout)}
    last, only = (
        found[f"backward of iteration {t}, block 2 (attention)"] for found, t in ((of, "4 of 4"), (of_one, "1 of 1"))
    )
    assert last.working - only.working == 2 * repeated + 1024 * 2 * 512  # and the gradient of what e drives


def test_time_grows_with_the_iterations():
    def seconds(**depth):
        made = recipe(*CORE, depth=replace(DEPTH, **depth))
        return plan.estimate(made, Layout(micro_batch=8), cluster(1)).seconds

    short, long = seconds(), seconds(mean_recurrence=32)
    for part in ("products", "mixing", "traffic"):
        assert 1.5 < long[part] / short[part] < 4
    made = recipe(*CORE, depth=DEPTH)
    alone, tensor = (plan.estimate(made, Layout(micro_batch=8, tp=tp), cluster(2)) for tp in (1, 2))
    exchanges = 2 * 2 * (4 + 2 * (8.9943 + 3.8625)) + 4  # 2 layers once each way, 2 as often as drawn
    moved = exchanges * 8 * 1024 * 512 * 2 / 2 * (made.train.global_batch_size / 8)
    assert tensor.seconds["tp"] == pytest.approx(moved / plan.GPUS["h200"].nvlink, rel=1e-3) and not alone.seconds["tp"]


def test_command_says_how_often_the_core_runs():
    result = CliRunner().invoke(
        cli.app, ["plan", "recurrent-depth-50m", "--gpus", "1", "train.micro_batch_size=8", "parallel.cp=1"]
    )
    assert result.exit_code == 0, result.output
    assert "iterations of the core: 8.99 in training, 3.86 of them with a gradient, 37 at most" in result.output


def test_huginn_costs_what_its_authors_say():
    """112 GFLOPs forward and 60 backward a token, without attention's own (arXiv 2502.05171): here without the half of
    the injection that all iterations share. 3,564,976,800 parameters are the sum of its shapes."""
    made = shipped.load("recurrent-depth-3.5b", require_inputs=False).recipe.model
    model = model_of(made)
    assert sum(p.numel() for p in model.parameters()) == 3_564_976_800
    mixing = sum(
        3 * p.mixing * p.passes.backward + p.mixing * (p.passes.forward - p.passes.backward)
        for p in passes.work(made, 4096)
    )
    shared = made.hidden_size**2
    n, k = 25.0, 7.98
    assert model.training_flops_per_token(4096) - mixing + 2 * shared * (n + 3 * k - 3) == pytest.approx(
        172e9, rel=5e-3
    )
