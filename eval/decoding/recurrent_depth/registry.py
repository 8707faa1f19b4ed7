"""Samplers by name, as they are typed: `ar`, `adaptive:exit=latent`, `diffusion:inner_steps=2,noise=0.2`."""

from riverrun.eval.decoding.recurrent_depth.adaptive import Adaptive
from riverrun.eval.decoding.recurrent_depth.autoregressive import Autoregressive
from riverrun.eval.decoding.recurrent_depth.diffusion import Diffusion
from riverrun.eval.decoding.recurrent_depth.sampler import Sampler
from riverrun.eval.decoding.recurrent_depth.speculative import Speculative
from riverrun.eval.decoding.registry import parse_spec

SAMPLERS: dict[str, type[Sampler]] = {
    "ar": Autoregressive,
    "adaptive": Adaptive,
    "speculative": Speculative,
    "diffusion": Diffusion,
}


def parse_sampler(spec: str) -> Sampler:
    """One sampler, as `name` or `name:key=value,key=value`.

    Raises:
        ValueError: an unknown name or key (all are listed), or an impossible value.
    """
    return parse_spec("sampler", spec, SAMPLERS)[1]
