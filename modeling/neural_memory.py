"""The part of a layer that is a neural memory: projections, gates and the memory's weights before the first token.

Queries, keys and values pass a short convolution and SiLU; queries and keys have unit length, or their powers have. The
size of steps is a share of what is stable for such keys (`NeuralMemoryOptions.step_cap`). Persistent tokens are written
before every sequence, as a chunk of their own, and the convolutions do not look back at them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from riverrun.kernels.causal_conv1d.reference import to_unit
from riverrun.kernels.common.memory_rule import curvature
from riverrun.kernels.memory_gates import Logits, memory_gates
from riverrun.kernels.neural_memory import Gates, MemoryState, fresh_state, neural_memory, write_memory
from riverrun.modeling.layers import ShortConv, at_least_fp32, fp32_parameter, short_convs
from riverrun.modeling.layout import Layout
from riverrun.modeling.memory_options import NeuralMemoryOptions
from riverrun.modeling.memory_statistics import RECENT, is_wanted, note_gates, note_memory
from riverrun.modeling.parallel.collectives import depend
from riverrun.modeling.parallel.split import Plan, Split
from riverrun.modeling.projection import project

Convolve = Callable[..., list[torch.Tensor]]


class MemoryInputs(NamedTuple):
    """What `neural_memory` takes of every token."""

    q: torch.Tensor  # (B, T, H, K)
    k: torch.Tensor
    v: torch.Tensor  # (B, T, H, V)
    gates: tuple[Gates, ...]
    delta: torch.Tensor | None  # (B, T, H)
    gamma: torch.Tensor | None  # (B, T, H)


class NeuralMemory(nn.Module):
    """(B, T, hidden_size) → what the memory says of every token (B, T, H, head_dim)."""

    def __init__(self, options: NeuralMemoryOptions, hidden_size: int):
        super().__init__()
        self.options = o = options
        H, D = o.num_heads, o.head_dim
        for name in "qkv":
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, H * D, bias=False))
            unit = D if name != "v" and o.feature_degree == 1 else None
            self.add_module(f"{name}_conv", ShortConv(H * D, o.conv_kernel, bias=False, unit=unit))
        for i, size in enumerate(o.layer_sizes):
            self.register_parameter(f"memory_{i}", nn.Parameter(torch.empty(H, *size)))
        self.norm_gain = nn.Parameter(torch.empty(H, D)) if o.norm and not o.is_linear else None
        self.feature_scale = fp32_parameter(o.feature_degree) if o.feature_degree > 1 else None
        for name in self._gates():
            if self._per_output(name):
                self.add_module(f"{name}_down", nn.Linear(hidden_size, o.gate_rank, bias=False))
                outs = [1] * (len(o.layer_sizes) - 1) + [D]  # the papers' gates have the width of the values
                ups = (nn.Linear(o.gate_rank, H * out, bias=False) for out in outs)
                self.add_module(f"{name}_up", nn.ModuleList(ups))
            else:
                self.add_module(f"{name}_proj", nn.Linear(hidden_size, self._copies(name) * H, bias=False))
            self.register_parameter(f"{name}_bias", fp32_parameter(self._copies(name), H))

    def project(self, x: torch.Tensor, *beside: nn.Linear) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
        """What `forward` takes of x (B, T, hidden_size), by name; and what other layers make of x."""
        layers: dict[str, nn.Linear] = {name: getattr(self, f"{name}_proj") for name in "qkv"}
        for name in self._gates():
            layers[name] = getattr(self, f"{name}_down" if self._per_output(name) else f"{name}_proj")
        made = project(x, *layers.values(), *beside)
        return dict(zip(layers, made)), made[len(layers) :]

    def forward(
        self,
        parts: Mapping[str, torch.Tensor],
        layout: Layout,
        states: dict[str, torch.Tensor] | None = None,
        persistent: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `project` makes of x (B, T, hidden_size), or (1, B·T, hidden_size) if packed; persistent
        (P, hidden_size) tokens."""

        def convolve(**convs: tuple[ShortConv, torch.Tensor]) -> list[torch.Tensor]:
            return short_convs(layout, states, **convs)

        inputs = self.inputs(parts, convolve)
        start = self.start(persistent)
        if layout.context is not None:
            from riverrun.modeling.parallel.neural_memory import context_neural_memory

            return context_neural_memory(layout.context, self, inputs, start)
        place = None
        if states and "memory_place" in states:
            place = layout.initial(states, "memory_place", torch.zeros(1, device=inputs.v.device))
        before = initial_state(layout, states, start, place)
        y, state = self.run(
            inputs, before, place, layout.cu_seqlens, layout.max_seqlen, resumable=states is not None
        )  # fmt: skip
        if is_wanted(self):
            self._note(inputs, layout, before, state)
        if states is not None:
            place = inputs.v.new_zeros(layout.num_sequences, dtype=torch.float32) if place is None else place
            lengths = inputs.v.shape[1] if layout.cu_seqlens is None else layout.cu_seqlens.diff()
            # 1 to b tokens of the chunk that the last one is in: never 0, which is that of a row without any
            states["memory_place"] = layout.last((place + lengths - 1) % self.options.chunk_size + 1)
            states.update({name: layout.last(part) for name, part in as_dict(state).items()})
        if self.options.read == "chunk" and torch.is_grad_enabled():
            # of sequences of one chunk nobody reads what is written, and ZeRO waits for every parameter's gradient
            for x in (inputs.k, inputs.v, *(gate for layer in inputs.gates for gate in layer if gate is not None)):
                y = depend(y, x)
        return y

    @property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """Per layer (H, in, out), before the first token."""
        return tuple(getattr(self, f"memory_{i}") for i in range(len(self.options.layer_sizes)))

    def _note(self, inputs: MemoryInputs, layout: Layout, before: MemoryState, after: MemoryState) -> None:
        (B, T), valid = layout.shape, None
        if layout.sequence is not None:
            valid = (layout.sequence == layout.sequence[:, -1:])[:, -RECENT:]
        k, v = (x.view(B, T, *x.shape[2:])[:, -RECENT:] for x in (inputs.k, inputs.v))

        def of_rows(state: MemoryState) -> MemoryState:
            return state._replace(past=None).each(layout.last)

        note_memory(k, v, valid, of_rows(before), of_rows(after), self.options.rule, self.norm_gain)

    def inputs(self, parts: Mapping[str, torch.Tensor], convolve: Convolve) -> MemoryInputs:
        """Of what `project` made; `convolve` takes pairs of a `ShortConv` and its input, by name, and returns the
        outputs."""
        o = self.options
        q, k, v = convolve(**{f"{name}_conv": (getattr(self, f"{name}_conv"), parts[name]) for name in "qkv"})
        q, k, v = (t.unflatten(-1, (-1, o.head_dim)) for t in (q, k, v))
        return MemoryInputs(
            self.features(q).to(v.dtype),
            self.features(k).to(v.dtype),
            v,
            self._memory_gates(parts),
            F.softplus(self._logits("delta", parts)) if "delta" in parts else None,
            self._logits("gamma", parts).sigmoid() if "gamma" in parts else None,
        )

    def run(
        self,
        inputs: MemoryInputs,
        state: MemoryState | None,
        place: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        chunk_size: int | None = None,
        heads: slice = slice(None),
        resumable: bool = False,
    ) -> tuple[torch.Tensor, MemoryState]:
        """`neural_memory` of these weights, or of some heads' if the inputs are of those; `place` (S,): tokens that the
        open chunk of each sequence has."""
        q, k, v, gates, delta, gamma = inputs
        rule = self.options.rule
        if chunk_size is None and is_wanted(self):
            note_gates(gates)
        return neural_memory(
            q,
            k,
            v,
            tuple(w[heads] for w in self.weights),
            gates,
            rule=rule if chunk_size is None else replace(rule, chunk_size=chunk_size),
            norm_weight=None if self.norm_gain is None else self.norm_gain[heads],
            delta=delta,
            gamma=gamma,
            initial_state=state,
            position=None if place is None else place.long(),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            resumable=resumable,
            keep=self.options.keep_states,
        )

    def start(self, persistent: torch.Tensor | None) -> MemoryState:
        """What sequences start from, as that of one."""
        o = self.options
        fresh = fresh_state(tuple(map(at_least_fp32, self.weights)), 1, o.rule, o.momentum, o.head_dim)
        if persistent is None or not len(persistent):
            return fresh

        def convolve(**convs: tuple[ShortConv, torch.Tensor]) -> list[torch.Tensor]:
            return [conv(x, None, None)[0] for conv, x in convs.values()]

        inputs = self.inputs(self.project(persistent[None])[0], convolve)
        if o.omega_window > 1 or o.newton_schulz:
            _, state = self.run(inputs, None, chunk_size=len(persistent))
        else:
            _, k, v, gates, delta, _ = inputs
            state = write_memory(k, v, fresh, gates, rule=o.rule, norm_weight=self.norm_gain, delta=delta)
        return state._replace(anchor=state.weights if o.chunk_size > 1 else None)

    def reset_parameters(self) -> None:
        o = self.options
        with torch.no_grad():
            for weight in self.weights:  # logarithms of small spread would be weights that are all equal
                nn.init.normal_(weight, std=1.0 if o.retention == "softmax" else weight.shape[1] ** -0.5)
            if self.norm_gain is not None:
                nn.init.constant_(self.norm_gain, o.head_dim**-0.5)  # the length of keys
            if self.feature_scale is not None:
                self.feature_scale.copy_(torch.tensor([1 / math.factorial(i + 1) for i in range(o.feature_degree)]))
            forgotten = 1 - 2 ** (-1 / o.first_half_life)
            biases = {
                "alpha": math.log(forgotten / (1 - forgotten)),
                "eta": math.log(o.momentum_init / (1 - o.momentum_init)),
                "theta": 0.0,
                "delta": math.log(math.e - 1),  # δ = 1
                "gamma": 0.0,
            }
            for name in self._gates():
                nn.init.constant_(getattr(self, f"{name}_bias"), biases[name])

    def parameter_plan(self) -> Plan:
        """Heads are split."""
        plan: Plan = {f"{name}_{part}.weight": 0 for name in "qkv" for part in ("proj", "conv")}
        plan |= {f"memory_{i}": 0 for i in range(len(self.weights))}
        if self.norm_gain is not None:
            plan["norm_gain"] = 0
        if self.feature_scale is not None:
            plan["feature_scale"] = None
        for name in self._gates():
            plan[f"{name}_bias"] = 1
            if self._per_output(name):
                plan[f"{name}_down.weight"] = None
                plan |= {f"{name}_up.{i}.weight": 0 for i in range(len(self.weights))}
            else:
                plan[f"{name}_proj.weight"] = Split(0, blocks=self._copies(name))
        return plan

    def mixing_flops(self, seq_len: int) -> float:
        """Per layer of the memory, of which one product counts as its weights': one to learn, one to read (two with a
        momentum), one for the gradient's outer product (two) and one back through all layers but the first; and pairs
        of tokens of a chunk, for every layer."""
        o = self.options
        online = o.is_linear and o.chunk_size == 1
        chunk = min(64 if online else o.chunk_size, seq_len)
        states = 2 if o.momentum else 1
        total = 0.0
        for i, (n, m) in enumerate(o.layer_sizes):
            back = 1 if i >= (2 if o.gated else 1) else 0
            reads = 1 if o.read == "chunk" else states
            total += 2 * n * m * (back + reads + states)
            if o.read != "chunk":
                total += 2 * chunk * (n + m)
        if online:
            total += 2 * chunk * (o.head_dim + o.feature_dim) + 2 * o.momentum * o.feature_dim * o.head_dim
        if o.newton_schulz:
            for n, m in o.layer_sizes:
                small, large = sorted((n, m))
                total += o.newton_schulz * (4 * small**2 * large + 2 * small**3) / chunk
        return o.num_heads * total

    def state_bytes(self) -> int:
        o = self.options
        copies = 1 + o.momentum + (o.chunk_size > 1)
        memory = 4 * o.num_heads * copies * sum(n * m for n, m in o.layer_sizes)
        past = 4 * (o.omega_window - 1) * o.num_heads * (o.feature_dim + o.head_dim + 1)
        pending = 4 * o.num_heads * len(o.layer_sizes) if o.newton_schulz else 0
        return memory + past + pending + 4 + 2 * 3 * (o.conv_kernel - 1) * o.num_heads * o.head_dim

    def _gates(self) -> tuple[str, ...]:
        o = self.options
        there = {"eta": o.momentum, "delta": o.bias == "huber", "gamma": o.omega_window > 1}
        return "alpha", "theta", *(name for name in there if there[name])

    def _per_output(self, name: str) -> bool:
        return self.options.gates == "channel" and name in ("alpha", "theta")

    def _copies(self, name: str) -> int:
        """Values a head: one, or one a layer."""
        each = self.options.gates != "head" and name in ("alpha", "theta", "eta")
        return len(self.options.layer_sizes) if each else 1

    def _logits(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, H), of a gate that has one a head."""
        return at_least_fp32(parts[name]) + at_least_fp32(getattr(self, f"{name}_bias"))[0]

    def _memory_gates(self, parts: Mapping[str, torch.Tensor]) -> tuple[Gates, ...]:
        layers, names = len(self.weights), [name for name in Logits._fields if name in parts]
        biases: dict[str, torch.Tensor] = {name: getattr(self, f"{name}_bias") for name in names}
        scale, shrink = self.largest_step()

        def gates(logits: Mapping[str, torch.Tensor], biases: Mapping[str, torch.Tensor]) -> Gates:
            return Gates(*memory_gates(Logits(**logits), Logits(**biases), scale=scale, shrink=shrink))

        if self._per_output("alpha"):

            def of_layer(i: int, name: str) -> torch.Tensor:
                """(B, T, H), or of the last layer's outputs (B, T, H, out)."""
                if not self._per_output(name):
                    return parts[name].unflatten(-1, (layers, -1))[..., i, :]
                x = getattr(self, f"{name}_up")[i](parts[name])
                return x.unflatten(-1, (biases[name].shape[1], -1)) if i == layers - 1 else x

            return tuple(
                gates({n: of_layer(i, n) for n in names}, {n: bias[i] for n, bias in biases.items()})
                for i in range(layers)
            )
        made = gates({n: parts[n] for n in names}, {n: bias.flatten() for n, bias in biases.items()})
        if (copies := self._copies("alpha")) == 1:
            return (made,) * layers
        each = ([None] * copies if x is None else x.unflatten(-1, (copies, -1)).unbind(-2) for x in made)
        return tuple(Gates(*gates) for gates in zip(*each))

    def largest_step(self) -> tuple[float, bool]:
        """The cap of θ without a momentum, and whether it is times 1 − η with one; see `NeuralMemoryOptions.step_cap`.

        A step along one key of unit length in a chunk of b scales the error by 1 − b κ θ / (1 − η) in the end if all
        keys are equal, κ being the memory's curvature as it starts (`curvature`), and by up to
        (1 + √(b / K))² κ θ / (1 − η) instead if they are random (the largest eigenvalue of their Gram matrix, Marchenko
        & Pastur 1967). At b = 1 one repeated key would bear θ up to (2 − α)(1 + η), but random ones do not: the squared
        error then grows from 2 (1 − η) on, as of any stochastic gradient with momentum. The gradients of a window share
        the step. An orthogonal update is of unit size whatever θ sums to over a chunk, at most 1. It is a rule of thumb
        for losses that are not quadratic, and where η changes much from token to token.
        """
        o = self.options
        if o.step_cap == "none":
            return 1.0, False
        if o.newton_schulz:
            return 1 / o.chunk_size, False
        keys = float(o.chunk_size)
        if o.step_cap == "random" and o.chunk_size > 1:
            keys = (1 + math.sqrt(o.chunk_size / o.feature_dim)) ** 2
        steepest = keys * o.omega_window * curvature(o.layer_sizes, o.norm and not o.is_linear, o.gated)
        return 2 / steepest, o.momentum

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, H, head_dim) as the convolution of queries or keys leaves it → the same, which has unit length; or of
        powers unit length too (B, T, H, degree · head_dim)."""
        if self.feature_scale is None:
            return x
        x = to_unit(at_least_fp32(x), x.shape[-1])
        powers = torch.cat([scale * x ** (i + 1) for i, scale in enumerate(self.feature_scale)], dim=-1)
        return to_unit(powers, powers.shape[-1])


def as_dict(state: MemoryState) -> dict[str, torch.Tensor]:
    """By the names that a cache has its parts by."""
    parts = state._asdict().items()
    return {f"memory_{name}_{i}": t for name, part in parts if part is not None for i, t in enumerate(part)}


def initial_state(
    layout: Layout, states: Mapping[str, torch.Tensor] | None, start: MemoryState, place: torch.Tensor | None
) -> MemoryState:
    """What the sequences start from: the rows' states, or `start`, that of one sequence, where `place` (S,) is 0."""

    def part(name: str, fresh: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor | None, ...] | None:
        if fresh is None:
            return None
        found = [layout.initial(states, f"memory_{name}_{i}", t) for i, t in enumerate(fresh)]
        if place is None:
            return tuple(found)
        return tuple(
            torch.where(place.view(-1, *[1] * (new.dim() - 1)) > 0, old, new)  # type: ignore[arg-type]
            for old, new in zip(found, fresh)
        )

    return MemoryState(*(part(name, fresh) for name, fresh in start._asdict().items()))  # type: ignore[arg-type]
