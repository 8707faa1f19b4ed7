"""Titans' memory as a context (MAC, arXiv 2501.00663, §4.1), segment by segment of C tokens from a document's start:

    h = f(M_{t−1}; q(S))                      what the memory says of the segment's tokens before it
    y = attention over [P ‖ h ‖ S]            of the queries of S, each of which sees h and S up to itself
    M_t = M_{t−1} written with k(y), v(y)     token by token
    o = RMSNorm(y) ∘ σ(RMSNorm(M(q(y))))      by the memory as it is at each token

The paper has M_t, which has been written with the whole segment, in the last line, and no limit on which h a token
sees: both would show it later tokens (`modeling.segmented_attention`). Persistent tokens P are attention's alone. What
widths h and y have is not in the paper. Here h is normed, and makes keys and values by a map of each head; y is
projected back to the stream's width, and normed as the stream is, before the memory takes it. So tensor-parallel ranks
sum what they project, once a segment, and need nothing else of each other's heads.

Segments follow each other, since the memory that one is read from has been written with the one before: rows cannot lie
on several ranks.
"""

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.kernels.gated_rms_norm import gated_rms_norm
from riverrun.kernels.neural_memory import MemoryState, read_memory
from riverrun.modeling.layers import RMSNorm, ShortConv, short_convs
from riverrun.modeling.layout import Layout
from riverrun.modeling.memory_options import TitansMACOptions
from riverrun.modeling.mixers.base import States, register
from riverrun.modeling.mixers.titans import TitansProjections, per_head
from riverrun.modeling.neural_memory import as_dict
from riverrun.modeling.parallel.collectives import all_reduce
from riverrun.modeling.parallel.split import Plan
from riverrun.modeling.projection import project
from riverrun.modeling.segmented_attention import segmented_attention
from riverrun.modeling.titans_attention import note_positions, running_positions
from riverrun.modeling.titans_segments import Segment, segments_of

KEYS = ("k", "v", "h_k", "h_v")
CONVS = ("q_conv", "k_conv", "v_conv")  # of the memory


@register("titans_mac")
class TitansMAC(TitansProjections):
    """See above.

    States are those of the memory; its weights at the start of the open segment, `memory_start_…`; the segment's keys
    and values (B, C, H, D), of which those at the places of later tokens are not seen; the last inputs of the
    convolution of queries over x, and of all three over y; and `memory_seen`.
    """

    context_parallel = False
    fetched_whole = True
    options: TitansMACOptions

    def __init__(self, options: TitansMACOptions, hidden_size: int, norm_eps: float):
        super().__init__(options, hidden_size, norm_eps)
        H, D = options.num_heads, options.head_dim
        self.h_norm_weight = nn.Parameter(torch.empty(D))
        self.h_k_weight = nn.Parameter(torch.empty(H, D, D))
        self.h_v_weight = nn.Parameter(torch.empty(H, D, D))
        self.y_proj = nn.Linear(H * D, hidden_size, bias=False)
        self.y_norm = RMSNorm(hidden_size, norm_eps)

    def forward(self, x: torch.Tensor, layout: Layout, states: States | None = None) -> torch.Tensor:
        positions = running_positions(layout, states)
        x = layout.flatten(x)
        q, k, v, queries = project(x, self.q_proj, self.k_proj, self.v_proj, self.memory.q_proj)  # type: ignore[arg-type]
        (queries,) = short_convs(layout, states, q_conv=(self.memory.q_conv, queries))  # type: ignore[arg-type]
        angles = layout.flatten(positions[..., None]).squeeze(-1)
        q, k = (self.turned(self.heads(t).transpose(1, 2), angles).transpose(1, 2) for t in (q, k))
        queries = self.memory.features(self.heads(queries)).to(v.dtype)

        seen = layout.initial(states, "memory_seen")  # tokens before the call, of each sequence
        chunks, segments = segments_of(x, layout, self.options.segment, None if seen is None else seen.long())
        tokens = (chunks.split(t).split(chunks.active) for t in (q, k, self.heads(v), queries))
        running = {name: chunks.sort(state) for name, state in self._start(layout, states, seen, k).items()}
        persistent, said, ended = self.persistent_keys(), [], []
        for segment, new in zip(segments, zip(*tokens)):
            if (n := len(segment.valid)) < len(running["k"]):  # the last ones, which are the shortest, have ended
                ended.append({name: state[n:] for name, state in running.items()})
                running = {name: state[:n] for name, state in running.items()}
            said.append(self._segment(segment, new, persistent, running, resumable=states is not None))
        y, m = (chunks.join(torch.cat(parts)) for parts in zip(*said))
        if states is not None:
            for name in running:
                after = torch.cat([part[name] for part in (running, *reversed(ended))])
                states[name] = layout.last(chunks.unsort(after))
            note_positions(states, positions)
        return layout.unflatten(self.o_proj((self.attention_output(y, x) * self.memory_output(m).sigmoid()).flatten(2)))

    def _start(
        self, layout: Layout, states: States | None, seen: torch.Tensor | None, like: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What each sequence goes on from or begins with, (S, …), some in the type of `like` (B, T, H, D)."""
        o, (H, D) = self.options, like.shape[2:]
        memory = self.memory.start(None)
        fresh = as_dict(memory) | {f"memory_start_{i}": w for i, w in enumerate(memory.weights)}
        fresh |= {name: like.new_zeros(1, o.segment, H, D) for name in KEYS}
        fresh |= {f"y_{name}": like.new_zeros(1, o.conv_kernel - 1, H * D) for name in CONVS}

        def start(name: str, begin: torch.Tensor) -> torch.Tensor:
            before = layout.initial(states, name, begin)
            assert before is not None
            if seen is None:
                return before
            goes_on = (seen > 0).view(-1, *[1] * (begin.dim() - 1))  # a row of zeros does not
            return torch.where(goes_on, before.to(begin.dtype), begin)

        return {name: start(name, begin) for name, begin in fresh.items()}

    def _segment(
        self,
        segment: Segment,
        new: tuple[torch.Tensor, ...],
        persistent: tuple[torch.Tensor | None, torch.Tensor | None],
        running: dict[str, torch.Tensor],
        resumable: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention and the memory say (n, w, H, D) of the tokens of n sequences.

        Args:
            new: q, k, v and the memory's queries (n, w, H, D).
            persistent: keys and values (H, P, D).
            running: what the sequences take from one segment to the next, by the names of `states`; updated in place.
            resumable: another call may go on with the last segment.
        """
        o, (q, k, v, queries) = self.options, new
        memory = _memory(running)
        start = memory.weights
        if segment.begin is not None:
            inside = (segment.begin > 0)[:, None, None, None]
            start = tuple(torch.where(inside, running[f"memory_start_{i}"], w) for i, w in enumerate(start))
        h = read_memory(queries, MemoryState(start), rule=o.rule, norm_weight=self.memory.norm_gain)
        h = gated_rms_norm(h, None, self.h_norm_weight, eps=o.norm_eps)
        own = dict(zip(KEYS, (k, v, per_head(h, self.h_k_weight), per_head(h, self.h_v_weight))))
        keys = {name: segment.beside(t, running[name]) for name, t in own.items()}
        q, k, v, h_k, h_v = (t.transpose(1, 2) for t in (q, *keys.values()))
        column = 0 if segment.column is None else segment.column
        y = segmented_attention(q, k, v, h_k, h_v, *persistent, column).transpose(1, 2)

        def convolve(**convs: tuple[ShortConv, torch.Tensor]) -> list[torch.Tensor]:
            outputs = []
            for name, (conv, t) in convs.items():
                output, running[f"y_{name}"] = conv(t, running[f"y_{name}"], segment.cu_seqlens)
                outputs.append(output)
            return outputs

        stream = self.y_norm(all_reduce(self.y_proj(y.flatten(2)), self.tp))
        inputs = self.memory.inputs(self.memory.project(segment.pack(stream))[0], convolve)
        m, memory = self.memory.run(
            inputs, memory, segment.begin, segment.cu_seqlens, queries.shape[1], resumable=resumable
        )  # fmt: skip
        running |= as_dict(memory) | {f"memory_start_{i}": w for i, w in enumerate(start)}
        if (missing := o.segment - keys["k"].shape[1]) > 0:  # of a call that is shorter than a segment
            keys = {name: F.pad(t, (0, 0, 0, 0, 0, missing)) for name, t in keys.items()}
        running |= keys
        return y, segment.unpack(m)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.h_norm_weight)
        for weight in (self.h_k_weight, self.h_v_weight):
            nn.init.normal_(weight, std=self.options.head_dim**-0.5)

    def parameter_plan(self, tp: int = 1) -> Plan:
        plan: Plan = {"h_k_weight": 0, "h_v_weight": 0, "h_norm_weight": None}
        plan |= {"y_proj.weight": 1, "y_norm.weight": None}
        return super().parameter_plan(tp) | plan

    def mixing_flops(self, seq_len: int) -> float:
        """Besides the memory's: attention, the reads of h, and that the memory's queries are made of x as well as y."""
        o = self.options
        whole, rest = divmod(seq_len, o.segment)
        tokens = (whole * o.segment * (o.segment + 1) + rest * (rest + 1)) / (2 * seq_len)  # that a query sees
        attention = 4 * o.num_heads * o.head_dim * (2 * tokens + o.num_persistent)
        reads = 2 * o.num_heads * sum(n * m for n, m in o.layer_sizes)
        return super().mixing_flops(seq_len) + attention + reads + 2 * self.q_proj.weight.numel()

    def state_bytes(self, seq_len: int) -> int:
        o = self.options
        channels = o.num_heads * o.head_dim
        start = 4 * o.num_heads * sum(n * m for n, m in o.layer_sizes)
        # `memory_seen` is in the place of what the memory counts itself
        return super().state_bytes(seq_len) + start + 2 * channels * (4 * o.segment + o.conv_kernel - 1)


def _memory(named: dict[str, torch.Tensor]) -> MemoryState:
    """The inverse of `as_dict`."""

    def part(field: str) -> tuple[torch.Tensor, ...] | None:
        return tuple(t for name, t in named.items() if name.startswith(f"memory_{field}_")) or None

    return MemoryState(*map(part, MemoryState._fields))  # type: ignore[arg-type]
