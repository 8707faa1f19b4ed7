"""`riverrun generate`: text from a model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from riverrun.launch.commands.eval import Device, Dtype, Model, Step, Trust
from riverrun.launch.console import err


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue; empty or left out: begin a text.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 file with the prompt, of any length.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most; an end-of-sequence token ends a sample earlier.")] = 128,
    temperature: Annotated[float, typer.Option(help="Below 1 favours likely tokens.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens only.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 0.95,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    decoding: Annotated[
        str | None,
        typer.Option(
            help="Control of repetition, with its options, as dry:base=2: presence, repetition, no_repeat_ngram, dry, "
            "lz or rpg, which change the logits before a token is drawn; typical or sample, which draw by their own "
            "options alone; greedy or contrastive, which draw nothing."
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="Of a model of recurrent depth, with its options, as diffusion:inner_steps=2: ar (slots), adaptive "
            "(exit, threshold, slots, continuous), speculative (draft_tokens, draft_steps) or diffusion (inner_steps, "
            "threshold, ema, noise, headway, max_wavefront, slots). Default: ar."
        ),
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Iterations of such a model's core; default: the mean in training.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples, drawn in parallel.")] = 1,
    prefix: Annotated[
        int, typer.Option(help="Tokens of the prompt that prefix linear attention reads without causality.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    step: Step = None,
    trust_remote_code: Trust = False,
) -> None:
    """Continue a prompt.

    The text goes to stdout (as it is made, for one sample on a terminal), speed and the size of the decoding state to
    stderr. The prompt may be longer than anything seen in training: recurrent layers need no more memory for it.
    """
    import torch
    from transformers import LogitsProcessorList

    from riverrun.eval.decoding.complete import Unpadded
    from riverrun.eval.decoding.contrastive import contrastive_search
    from riverrun.eval.decoding.decode import require_forking
    from riverrun.eval.decoding.generate import Sampling
    from riverrun.eval.decoding.generate import generate as decode
    from riverrun.eval.decoding.recurrent_depth.registry import parse_sampler
    from riverrun.eval.decoding.recurrent_depth.sampler import DepthGeneration, require_depth, sample
    from riverrun.eval.decoding.registry import parse_decoding
    from riverrun.eval.decoding.stream import TextPrinter, continuation
    from riverrun.eval.models import load_model

    sampling = Sampling(temperature, top_k, top_p, greedy)
    chosen = None if decoding is None else parse_decoding(decoding)
    recurrent = None if sampler is None and num_steps is None else parse_sampler(sampler or "ar")
    if recurrent is not None and (chosen is not None or prefix):
        raise ValueError(
            "samplers of recurrent depth read prompts causally, and draw by --temperature, --top-k, --top-p or "
            "--greedy alone: leave out --decoding and --prefix, or --sampler and --num-steps"
        )
    if chosen is not None and (chosen.name == "greedy" or chosen.samples):
        sampling = Sampling(temperature=1.0, top_p=1.0, greedy=chosen.name == "greedy")
    searches = chosen is not None and chosen.name == "contrastive"
    if searches and num_samples > 1:
        raise ValueError(f"contrastive search finds one text: leave out --num-samples {num_samples}")
    if searches and prefix:
        raise ValueError(f"contrastive search reads prompts causally: leave out --prefix {prefix}")
    text = _prompt(prompt, prompt_file)
    loaded = load_model(model, device=device, dtype=dtype, step=step, trust_remote_code=trust_remote_code)
    if recurrent is not None:
        require_depth(loaded.model)
    tokenizer = loaded.require_tokenizer()
    ids = tokenizer.encode(text)
    start = tokenizer.bos_id
    if not ids or (start is not None and not loaded.is_riverrun):
        ids = [tokenizer.eos_id if start is None else start, *ids]
    live = num_samples == 1 and sys.stdout.isatty() and not searches
    streamer = TextPrinter(tokenizer, ids, sys.stdout) if live else None
    if live:
        sys.stdout.write(text)
    if searches:
        assert chosen is not None
        result = contrastive_search(
            require_forking(loaded), ids, chosen.options, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id
        )
    elif recurrent is not None:
        result = sample(
            loaded.model, ids, recurrent, sampling, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id,
            num_samples=num_samples, num_steps=num_steps, seed=seed, streamer=streamer,
        )  # fmt: skip
    else:
        processors = None
        if chosen is not None:
            seen = torch.full((num_samples, len(ids)), int(chosen.sees_prompt))
            processors = LogitsProcessorList([Unpadded(chosen.processors(tokenizer), seen)])
        result = decode(
            loaded.model, ids, sampling, max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id,
            num_samples=num_samples, seed=seed, streamer=streamer, processors=processors, prefix=prefix,
        )  # fmt: skip
    for number, tokens in enumerate(result.tokens, 1):
        if num_samples > 1:
            print(f"--- sample {number} of {num_samples} ---")
        print("" if live else text + continuation(tokenizer, ids, tokens))
    state = (
        "" if result.state_bytes is None else f", decoding state {result.state_bytes / num_samples:,.0f} bytes a sample"
    )
    if isinstance(result, DepthGeneration) and result.decoded:
        state += f", {result.mean_iterations:.1f} iterations a token, {result.calls / result.decoded:.1f} in sequence"
    err.print(
        f"prompt of {len(ids):,} tokens read in {result.prefill_seconds:.2f} s; {result.num_tokens:,} new tokens, "
        f"{result.tokens_per_second:,.1f} tokens/s{state}",
        style="dim", highlight=False, soft_wrap=True,
    )  # fmt: skip


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise ValueError("give either --prompt or --prompt-file, not both")
    if prompt_file is None:
        return prompt or ""
    try:
        return prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt_file} is not UTF-8 text ({error})") from None
