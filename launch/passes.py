"""How often each part of a model runs on a micro batch in training: once, or, with recurrent depth, several times."""

from dataclasses import dataclass
from functools import lru_cache

from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.depth.counts import RecurrenceDistribution
from riverrun.modeling.depth.model import DepthModel
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel.sharding import meta_model
from riverrun.modeling.stack import block_flops


@dataclass(frozen=True)
class Passes:
    """Runs on a micro batch, on average.

    Attributes:
        forward: forward passes, those without a gradient among them.
        backward: those that have a gradient.
        again: under recompute, those are computed again.
    """

    forward: float = 1.0
    backward: float = 1.0
    again: bool = True

    def ways(self, recompute: bool) -> tuple[float, float]:
        """Times that it is computed forward, and backward."""
        return self.forward + (self.backward if recompute and self.again else 0.0), self.backward


ONCE = Passes(again=False)  # what a recurrent core has before its first iteration and after its last


@dataclass(frozen=True)
class Work:
    """A part of the model: a layer, or what a recurrent core has besides its layers.

    Attributes:
        mixer: of a layer; None: there is none.
        matrices: FLOPs a token of one forward pass in products with weights.
        mixing: what the mixer computes beyond that.
    """

    mixer: str | None
    matrices: float
    mixing: float
    passes: Passes


@lru_cache(maxsize=64)
def passes(options: ModelOptions) -> list[Passes]:
    """Of every layer, in training."""
    if options.depth is None:
        return [Passes(r, r) for r in inference_passes(options)]
    n, k = RecurrenceDistribution(options.depth).mean_steps
    return [Passes(n + k, k) if i in core_layers(options) else Passes() for i in range(options.num_hidden_layers)]


def inference_passes(options: ModelOptions) -> list[int]:
    """Of every layer, in a forward pass by default."""
    if options.universal is not None:  # all positions are computed at every step, halted or not
        return [options.universal.max_steps] * options.num_hidden_layers
    if options.depth is None:
        return [1] * options.num_hidden_layers
    core = core_layers(options)
    return [options.depth.mean_recurrence if i in core else 1 for i in range(options.num_hidden_layers)]


def core_layers(options: ModelOptions) -> range:
    """Of a model of recurrent depth, which layers iterate."""
    assert options.depth is not None
    return range(options.depth.prelude_layers, options.num_hidden_layers - options.depth.coda_layers)


@lru_cache(maxsize=64)
def most_graded(options: ModelOptions) -> int:
    """Passes with a gradient, at most, of the layers that run several times."""
    if options.depth is None:
        return 1 if options.universal is None else options.universal.max_steps
    return min(options.depth.backprop_depth, RecurrenceDistribution(options.depth).largest)


@lru_cache(maxsize=64)
def work(options: ModelOptions, seq_len: int) -> list[Work]:
    """All of the model but embedding and head."""
    body = meta_model(RiverrunConfig.from_options(options)).model
    found, of_layers = [], passes(options)
    for mixer, block, often in zip(options.layers, body.layers, of_layers):
        mixing = block.mixer.mixing_flops(seq_len)
        found.append(Work(mixer, block_flops([block], seq_len) - mixing, mixing, often))
    if isinstance(body, DepthModel):
        often = of_layers[core_layers(options).start]
        found.append(Work(None, body.core.injection.step_flops(), 0.0, often))
        found.append(Work(None, body.core.call_flops(), 0.0, ONCE))
    return found
