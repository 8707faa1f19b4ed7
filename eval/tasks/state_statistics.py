"""What the recurrent states do over position, by layer and head: norm, growth, and how much of the first token is kept.

Stuffed Mamba (arXiv 2410.07145): where a model collapses beyond its training length, the states of a few heads grow
far beyond what training has seen, and these heads have decays near 1, so that they never forget the first token.
Statistics are kept by head, since a mean over heads hides the few.

    norm       ‖h_t‖, Frobenius, over the state of the head; mixers without heads count as one. A stack of several
               states (c, n, m, h of sLSTM; the matrices of a neural memory) is taken as one vector.
    growth     ‖h_t‖ at the last position over that at the training length.
    retention  α_2 ⋯ α_t: the share of the first token's contribution to the state that is left, of mixers whose state
               decays by a scalar a head: mamba2, and gated_delta, where it is an upper bound (Householder steps erase
               more).

States are read from the cache between chunks, at powers of two, the training length and the end; the decays, which no
cache keeps, are computed again from what goes into each mixer.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch.nn import functional as F

from riverrun.eval.batches import Tokens
from riverrun.eval.harness import TaskResult
from riverrun.eval.tasks.perplexity import evaluating
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.layers import at_least_fp32
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers.gated_delta import GatedDelta
from riverrun.modeling.mixers.mamba2 import Mamba2
from riverrun.modeling.model import RiverrunForCausalLM
from riverrun.modeling.stack import RiverrunModel

TASK, VERSION = "state_statistics", 1
STATES = ("ssd", "delta", "cell", "linear")  # the rest of a cache is convolution tails, keys and values
KEPT = 0.997  # "never forgets", arXiv 2410.07145


@dataclass(frozen=True)
class Head:
    """One head over the positions of `StateStatistics`; means over documents.

    Attributes:
        norm: (P,).
        retention: (P,); None for mixers without scalar decays.
    """

    layer: int
    mixer: str
    head: int
    norm: np.ndarray
    retention: np.ndarray | None


@dataclass(frozen=True)
class StateStatistics:
    """Attributes:
    positions: (P,) tokens seen.
    reference: index in `positions` of the training length; None if it is unknown or not reached.
    """

    positions: tuple[int, ...]
    reference: int | None
    documents: int
    heads: tuple[Head, ...]

    def growth(self, head: Head) -> float | None:
        """None without a reference, or where the state is zero there."""
        if self.reference is None or head.norm[self.reference] == 0:
            return None
        return float(head.norm[-1] / head.norm[self.reference])


def log_decay(mixer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor | None:
    """hidden (B, T, D) into a mixer → log α (B, T, H); None for mixers without scalar decays."""
    if isinstance(mixer, Mamba2):
        dt = F.linear(hidden, mixer.dt_proj.weight)
    elif isinstance(mixer, GatedDelta) and mixer.options.use_gate:
        dt = F.linear(hidden, mixer.a_proj.weight)
    elif isinstance(mixer, GatedDelta):
        return at_least_fp32(hidden.new_zeros(*hidden.shape[:2], mixer.options.num_heads))
    else:
        return None
    decay = -at_least_fp32(mixer.A_log).exp() * F.softplus(at_least_fp32(dt) + at_least_fp32(mixer.dt_bias))
    if isinstance(mixer, Mamba2) and mixer.state_control is not None:
        return mixer.state_control.log_decay(decay)
    return decay


def head_norms(states: dict[str, torch.Tensor]) -> np.ndarray | None:
    """A layer's cache, one row → (H,) norms in float64; None if it holds no recurrent state."""
    for name in STATES:
        if name in states:
            state = states[name][0].double()
            if name == "cell" and state.dim() == 3:  # (NS, H, K), see riverrun.kernels.head_rnn
                state = state.transpose(0, 1)
            flat = state.flatten(1) if state.dim() == 3 else state.reshape(1, -1)
            return flat.norm(dim=1).cpu().numpy()
    layers = [state[0].double().flatten(1) for name, state in states.items() if name.startswith("memory_weights_")]
    return torch.cat(layers, dim=1).norm(dim=1).cpu().numpy() if layers else None


@contextmanager
def _retentions(model: RiverrunForCausalLM) -> Iterator[dict[int, torch.Tensor]]:
    """By layer, (H,) Σ log α over the tokens read inside this block, the first token's left out; one row."""
    sums: dict[int, torch.Tensor] = {}

    def hook(index: int):
        def before(mixer: torch.nn.Module, args: tuple) -> None:
            decay = log_decay(mixer, args[0])
            if decay is not None:
                total = decay[0].double()
                sums[index] = total.sum(0) + sums[index] if index in sums else total[1:].sum(0)

        return before

    handles = [block.mixer.register_forward_pre_hook(hook(i)) for i, block in enumerate(model.model.layers)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def check(model: RiverrunForCausalLM) -> None:
    """Raises ValueError if the model's layers run several times: each then has states of every iteration."""
    if not isinstance(model.model, RiverrunModel):
        raise ValueError("state statistics are of models of fixed depth: --states 0 leaves a looped model's states out")


@torch.no_grad()
def measure(
    model: RiverrunForCausalLM, documents: Iterable[Tokens], *, train_length: int | None, chunk_len: int
) -> StateStatistics:
    """Statistics over the length of the shortest document, one document at a time, in constant memory.

    Raises:
        ValueError: no documents or tokens, a chunk_len below 1, or a model without recurrent states or of recurrent
            depth.
    """
    check(model)
    rows = [np.asarray(tokens, np.int64) for tokens in documents]
    end = min(map(len, rows), default=0)
    if end < 1 or chunk_len < 1:
        raise ValueError(f"state statistics need documents with tokens, and chunk_len={chunk_len} of at least 1")
    places = _places(end, train_length)
    norms: list[list[dict[int, np.ndarray]]] = []  # by document, position, layer: (H,)
    kept: list[list[dict[int, np.ndarray]]] = []
    with evaluating(model):
        for row in rows:
            found = list(_follow(model, torch.from_numpy(row[:end]), places, chunk_len))
            norms.append([norm for norm, _ in found])
            kept.append([retention for _, retention in found])
    heads = []
    for layer, mixer in enumerate(model.model.options.layers):
        if layer not in norms[0][0]:
            continue
        norm = np.mean([[at[layer] for at in document] for document in norms], axis=0)  # (P, H)
        retention = None
        if layer in kept[0][0]:
            retention = np.mean([[at[layer] for at in document] for document in kept], axis=0)
        heads += [
            Head(layer, mixer, h, norm[:, h], None if retention is None else retention[:, h])
            for h in range(norm.shape[1])
        ]
    if not heads:
        raise ValueError("none of this model's layers is recurrent: --states 0 leaves their states out")
    reference = places.index(train_length) if train_length is not None and train_length <= end else None
    return StateStatistics(tuple(places), reference, len(rows), tuple(heads))


def _places(end: int, train_length: int | None) -> list[int]:
    powers = {2**k for k in range(end.bit_length())}
    return sorted(p for p in powers | {end, train_length or end} if p <= end)


def _follow(
    model: RiverrunForCausalLM, tokens: torch.Tensor, places: Sequence[int], chunk_len: int
) -> Iterator[tuple[dict[int, np.ndarray], dict[int, np.ndarray]]]:
    """At each place, by layer, the heads' norms and retentions of layers that have them."""
    device = model.lm_head.weight.device
    cache = RiverrunCache(model.config.num_hidden_layers)
    with _retentions(model) as sums:
        for place in places:
            for piece in tokens[None, cache.seen : place].to(device).split(chunk_len, dim=1):
                layout = Layout.of_rows((1, piece.shape[1]), torch.tensor([cache.seen], device=device))
                model.model(piece, layout, cache)
            found = enumerate(map(head_norms, cache.layers))
            yield (
                {layer: norm for layer, norm in found if norm is not None},
                {layer: total.exp().cpu().numpy() for layer, total in sums.items()},
            )


def summarize(statistics: StateStatistics, available: int, config: dict) -> TaskResult:
    """`heads_kept` counts the heads that keep more than KEPT of the first token at the end."""
    growths = [g for head in statistics.heads if (g := statistics.growth(head)) is not None]
    kept = [float(head.retention[-1]) for head in statistics.heads if head.retention is not None]
    return TaskResult(
        TASK,
        VERSION,
        {
            "largest_growth": max(growths, default=None),
            "median_growth": float(np.median(growths)) if growths else None,
            "heads_kept": float(sum(r > KEPT for r in kept)) if kept else None,
        },
        {},
        {"largest_growth": False, "median_growth": False, "heads_kept": False},
        statistics.documents,
        available,
        config,
        {
            "positions": list(statistics.positions),
            "heads": [
                {
                    "layer": head.layer,
                    "mixer": head.mixer,
                    "head": head.head,
                    "growth": statistics.growth(head),
                    "norm": head.norm.tolist(),
                    "retention": None if head.retention is None else head.retention.tolist(),
                }
                for head in statistics.heads
            ],
        },
    )


def table(statistics: StateStatistics, most: int = 8) -> Table:
    """The heads whose states grow most, or are largest where growth is unknown."""
    found = Table()
    for name in ("layer", "mixer", "head", "norm", "growth", "retention of the first token"):
        found.add_column(name, justify="right")
    heads = sorted(statistics.heads, key=lambda h: (-(statistics.growth(h) or 0), -h.norm[-1]))
    for head in heads[:most]:
        growth, kept = statistics.growth(head), head.retention
        found.add_row(
            str(head.layer), head.mixer, str(head.head), f"{head.norm[-1]:.4g}",
            "–" if growth is None else f"{growth:.3f}", "–" if kept is None else f"{kept[-1]:.4f}",
        )  # fmt: skip
    return found


def plot(statistics: StateStatistics, path: Path, title: str) -> None:
    """A line a head, coloured by layer: norms and, where defined, retention of the first token; as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (norms, kept) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    layers = max(head.layer for head in statistics.heads)
    colours, named = matplotlib.colormaps["viridis"], set()
    for head in statistics.heads:
        style = {"color": colours(head.layer / max(1, layers)), "linewidth": 1, "marker": ".", "markersize": 3}
        label = f"layer {head.layer}: {head.mixer}" if layers < 12 and head.layer not in named else None
        named.add(head.layer)
        norms.plot(statistics.positions, head.norm, label=label, **style)
        if head.retention is not None:
            kept.plot(statistics.positions, head.retention, **style)
    for axes in (norms, kept):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.set_xlabel("position (tokens seen)")
        if statistics.reference is not None:
            axes.axvline(statistics.positions[statistics.reference], color="black", linestyle="--", linewidth=1)
    norms.set(yscale="log", ylabel="norm of the state")
    kept.set(ylim=(-0.02, 1.02), ylabel="retention of the first token")
    if layers < 12:
        norms.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=144)
    plt.close(figure)
