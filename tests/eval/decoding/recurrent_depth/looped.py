"""Tiny models whose cores are of each kind, and greedy texts by plain means."""

from dataclasses import replace
from functools import cache

import torch

from riverrun.eval.decoding.generate import Sampling
from riverrun.eval.decoding.recurrent_depth.choice import Choice
from riverrun.eval.decoding.recurrent_depth.registry import parse_sampler
from riverrun.eval.decoding.recurrent_depth.sampler import Progress, read_prompt, sample
from riverrun.modeling.model import RiverrunForCausalLM
from tests.modeling.depth.shapes import HUGINN, PARCAE, SHAPES, around, build, tokens

CORES = {  # and seeds by which greedy texts are not one token again and again
    "attention": (HUGINN, 5),
    "attention, window": (SHAPES["attention, window"], 2),
    "gated_delta": (SHAPES["gated_delta, diagonal"], 0),
    "mamba2": (around(HUGINN, "mamba2"), 4),
    "para_lstm": (around(HUGINN, "para_lstm"), 1),
    "mixed": (around(HUGINN, "attention", "mamba2"), 0),
    "recurrent throughout": (replace(HUGINN, layer_pattern=("gated_delta",)), 3),
    "all core": (SHAPES["all core"], 1),
}
CONTRACTION = replace(PARCAE, initializer_range=0.1, depth=replace(PARCAE.depth, mean_recurrence=32)), 1
PROMPT = tokens(1, 7)[0].tolist()
R = 8
GREEDY = Sampling(greedy=True)


@cache
def model_of(core: str) -> RiverrunForCausalLM:
    """One of `CORES`, or the contraction, in float64; to be left as it is."""
    options, seed = CONTRACTION if core == "contraction" else CORES[core]
    return build(options, seed=seed)


def decode(model: RiverrunForCausalLM, spec: str, number: int = 12, sampling: Sampling = GREEDY, **options):
    options = {"eos_id": None, "num_steps": R, **options}
    return sample(model, PROMPT, parse_sampler(spec), sampling, max_new_tokens=number, **options)


@torch.no_grad()
def full(model: RiverrunForCausalLM, number: int = 12, num_steps: int = R) -> list[int]:
    """The likeliest tokens, by a forward pass over everything for each."""
    ids = torch.tensor([PROMPT])
    for _ in range(number):
        ids = torch.cat([ids, model(ids, num_steps=num_steps).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(PROMPT) :].tolist()


def progress(
    model: RiverrunForCausalLM,
    first: list[int],
    *,
    slots: int | None = None,
    wanted: int = 1000,
    num_steps: int = R,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> Progress:
    """After the prompt, with given first tokens, a row each."""
    with torch.no_grad():
        prompt, _ = read_prompt(model, PROMPT, slots, num_steps)
    prompt.reorder_cache(torch.zeros(len(first), dtype=torch.long))
    choice = Choice(sampling, seed, torch.device("cpu"))
    return Progress(model, prompt, choice, num_steps, torch.tensor(first)[:, None], wanted)
