"""How a Riverrun model of recurrent depth runs a chain: units are its blocks, and an iteration of its core.

With P blocks of prelude and C of coda the units are 0 … P−1, the iteration P (the injection and all layers of the
core), and P+1 … P+C; the model as it is runs unit P r times. Between units there are three hidden states: s and e of
the core, and x, what the next block gets.

    a block        x ← block(x), e ← x, s ← s_0
    an iteration   s ← core(s, e), x ← norm(s), read out first and without the norm as the model has it

So iterations that follow one another are a loop over what came before them, from s_0 on, and leave what the model's
loop leaves; a chain that returns to the core after other blocks has another loop. The paper has no such models: this is
one reading of chains in which any order of units means something. No place in a chain sees the states of another: each
has its own keys and values, or recurrent states, for every layer.
"""

from collections.abc import Iterator
from itertools import islice

import torch

from riverrun.eval.depth_search.chains import Chain
from riverrun.eval.depth_search.units import Start, Units
from riverrun.eval.models import LoadedModel, depth_body
from riverrun.modeling.cache import RiverrunCache
from riverrun.modeling.layout import Layout
from riverrun.modeling.mixers import States

Flow = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""s, e, x: (B, T, h) each."""


class RecurrentUnits(Units):
    """
    Raises:
        ValueError: a model of fixed depth.
    """

    def __init__(self, model: LoadedModel):
        self.network, self.body = model.model, depth_body(model)
        body, r = self.body, self.body.depth.mean_recurrence
        self.core = core = len(body.prelude)
        self.blocks = {**dict(enumerate(body.prelude)), **dict(enumerate(body.coda, core + 1))}
        self.identity = (*range(core), *r * [core], *range(core + 1, core + 1 + len(body.coda)))
        ids = torch.arange(10, device=model.device).view(2, 5) % model.vocab_size
        with torch.no_grad():
            same = torch.equal(self.run(self.identity, ids), self.network(ids, use_cache=False).logits)
        assert same, "units run one by one give the model's logits, bit by bit"

    @torch.no_grad()
    def start(self, ids: torch.Tensor) -> Start:
        """Hidden states are (B, T, 3, h): s, e, x."""
        layout = Layout.of_rows((len(ids), ids.shape[1]), ids.new_zeros(len(ids)))
        flow = self._enter(ids, layout, None)
        return Start(torch.stack(flow, 2), (flow[0], layout))

    @torch.no_grad()
    def apply(self, unit: int, hidden: torch.Tensor, start: Start) -> torch.Tensor:
        s, e, x = (part.contiguous() for part in hidden.unbind(2))
        return torch.stack(self._step(unit, (s, e, x), *start.arguments), 2)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        return self._head(hidden[:, :, 2].contiguous(), keep)

    @torch.no_grad()
    def next_tokens(self, chain: Chain, prompt: list[int]) -> Iterator[int]:
        new = torch.tensor([prompt], device=self.network.device)
        cache = RiverrunCache(sum(map(self._size, chain)))
        while True:
            start = new.new_zeros(1) if cache.next_position is None else cache.next_position
            layout = Layout.of_rows((1, new.shape[1]), start)
            flow, slots = self._enter(new, layout, cache), iter(cache.layers)
            s_0 = flow[0]
            for unit in chain:
                flow = self._step(unit, flow, s_0, layout, list(islice(slots, self._size(unit))))
            cache.advance(layout.positions, layout.sequence)
            new = self._head(flow[2], 1)[:, -1].argmax(-1, keepdim=True)
            yield int(new)

    def _size(self, unit: int) -> int:
        """Layers of a unit."""
        return len(self.body.core.layers) if unit == self.core else 1

    def _enter(self, ids: torch.Tensor, layout: Layout, cache: RiverrunCache | None) -> Flow:
        x = self.body.embed(ids)
        self.body.prepare_attention(layout, cache, x.dtype)
        return self.body.initial_state(x, layout), x, x

    def _step(
        self, unit: int, flow: Flow, s_0: torch.Tensor, layout: Layout, states: list[States] | None = None
    ) -> Flow:
        s, e, x = flow
        if unit != self.core:
            x = self.body.run([self.blocks[unit]], x, layout, states)
            return s_0, x, x
        s = self.body.core.iterate(s, e, layout, states)
        left = self.body.core.injection.read_out(s)
        return s, e, self.body.norm(left) if self.body.depth.norm_core else left

    def _head(self, x: torch.Tensor, keep: int) -> torch.Tensor:
        return self.network.lm_head(self.body.norm(x)[:, -keep:])
