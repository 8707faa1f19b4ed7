"""A narrow copy of every shipped recipe, of the same pattern and options, on ranks that share its layers and rows."""

from dataclasses import fields, replace

import pytest

from riverrun.launch import shipped
from riverrun.modeling.mixers import MIXERS
from riverrun.modeling.options import ModelOptions
from tests.modeling.parallel.sharded import BASE, BOUNDS, assert_parts_make_the_whole, part

SIZES = (
    "num_heads", "num_kv_heads", "head_dim", "state_size", "num_groups", "chunk_size", "expand_v", "tolerance",
    "segment", "expand", "gate_rank", "attention_window",
)  # fmt: skip


def narrow(options: ModelOptions) -> ModelOptions:
    """The recipe's pattern and options with the sizes of the tests' models."""
    mixers = {}
    for name in set(options.layer_pattern):
        theirs, ours = getattr(options, name), getattr(BASE, name)
        sizes = {f.name: getattr(ours, f.name) for f in fields(theirs) if f.name in SIZES}
        mixers[name] = replace(theirs, **sizes)
        if hasattr(theirs, "max_recurrent_weight"):
            mixers[name] = replace(mixers[name], expand=1.0)
    layers, depth = max(2, len(options.layer_pattern)), options.depth
    if depth is not None:
        depth = replace(depth, prelude_layers=1, coda_layers=1, mean_recurrence=3, backprop_depth=2)
        layers = max(3, layers)
    return replace(
        options,
        depth=depth,
        vocab_size=BASE.vocab_size,
        hidden_size=BASE.hidden_size,
        intermediate_size=BASE.intermediate_size if options.intermediate_size else 0,
        num_hidden_layers=layers,
        initializer_range=BASE.initializer_range,
        **mixers,
    )


@pytest.mark.parametrize("recipe", shipped.names())
def test_a_narrow_copy_is_shared_exactly(ranks, recipe):
    options = narrow(shipped.load(recipe, [], require_inputs=False).recipe.model)
    alone = options.reads_prefix or not all(MIXERS[mixer].context_parallel for mixer in options.layers)
    cp, tp, prefix = (1, 4, 7 * options.reads_prefix) if alone else (2, 2, 0)  # rows with a prefix are not shared
    results = ranks(4).run(part, options, cp, tp, True, BOUNDS, "auto", "auto", prefix)
    assert_parts_make_the_whole(results, options, cp, tp, BOUNDS, prefix)
