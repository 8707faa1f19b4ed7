"""What one block, or the head, allocates and moves on a GPU: counted by running it on tensors without memory.

Forward and backward run under torch's `FakeTensorMode`, on the code that trains: what an op's `backend="auto"` takes on
CUDA, with what its autograd saves. No GPU is needed. Three stand-ins make fakes of the CPU, which every build of
torch has, behave as tensors on CUDA: `is_cuda`; torch's attention and RMSNorm, whose CUDA kernels save other things
than the CPU's; and collectives of tensor parallelism, which allocate what they return and send nothing.

Allocated bytes are followed operator by operator. They are affine in the rows of a batch, and so are two runs, with two
rows and with three, enough for any number of tokens: the peak is the largest of those lines, which need not be the same
one for few tokens (a weight's gradient) and for many (activations).

Not seen: what a kernel's launcher allocates and frees again, for which `launch/inside.py` has formulas; torch.compile.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from riverrun.kernels.linear_cross_entropy import CHUNK_BYTES_OF_GPU, linear_cross_entropy
from riverrun.launch.inside import INSIDE
from riverrun.modeling import attention_block
from riverrun.modeling.config import RiverrunConfig
from riverrun.modeling.layers import RMSNorm
from riverrun.modeling.layout import Layout, rotary_tables
from riverrun.modeling.memory_options import NeuralMemoryOptions
from riverrun.modeling.options import ModelOptions
from riverrun.modeling.parallel import collectives
from riverrun.modeling.parallel.loss import sharded_cross_entropy
from riverrun.modeling.parallel.mesh import Axis
from riverrun.modeling.parallel.sharding import meta_model, parameter_plan

TOKENS = 512  # of a traced row, however long the recipe's are, but for memories: several chunks of every recurrence
LOOPS = 1000  # operators of a pass over so many tokens: beyond, torch loops over chunks


@dataclass(frozen=True)
class Pass:
    """One way through a block: bytes after each operator, and what the operators do.

    Attributes:
        alive: (operators, 2) bytes for one row of `TOKENS` and for two: the block's input included, parameters not.
        inside: (operators, 2) what of it the launchers of recurrences hold: states at the chunks' edges.
        traffic: (2,) bytes read and written by operators that are no products with weights.
        count: (2,) operators.
    """

    alive: np.ndarray
    inside: np.ndarray
    traffic: np.ndarray
    count: np.ndarray

    def peak(self, rows: float) -> tuple[float, float]:
        """The most bytes at once for so many rows, and what of it was inside launchers."""
        alive = _line(self.alive, rows)
        at = int(alive.argmax())
        return float(alive[at]), float(_line(self.inside[at], rows))

    def moved(self, rows: float) -> float:
        """Bytes."""
        return float(_line(self.traffic, rows))

    def operators(self, rows: float) -> float:
        """That the host starts."""
        return float(_line(self.count, rows))


@dataclass(frozen=True)
class Footprint:
    """A block's forward and backward pass on one rank.

    Attributes:
        row: tokens of one traced row.
        kept: (2,) bytes saved from the forward for the backward, the block's input included, its output not.
        input: (2,) bytes of the block's input alone.
    """

    row: int
    forward: Pass
    backward: Pass
    kept: np.ndarray
    input: np.ndarray

    def saved(self, tokens: int) -> float:
        """Bytes from forward to backward, for `tokens` of a rank before tensor parallelism shares them."""
        return float(_line(self.kept, tokens / self.row))

    def entered(self, tokens: int) -> float:
        """Bytes of the block's input, all that is kept under recompute."""
        return float(_line(self.input, tokens / self.row))


def _line(of_two: np.ndarray, rows: float) -> np.ndarray:
    """The affine function of rows that has the given values (..., 2) at one row and two."""
    return of_two[..., 0] + (rows - 1) * (of_two[..., 1] - of_two[..., 0])


# operators that move nothing, or whose time is that of their products
_STILL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "mm", "addmm", "_unsafe_view", "alias")


class _Recorder(TorchDispatchMode):
    """Follows the bytes of all storages that operators make, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self._known: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """Of another pass; what is alive stays."""
        self.alive: list[int] = []
        self.inside: list[float] = []
        self.traffic = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return out
        name = func._schema.name.partition("::")[2]
        given, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        before = {t.untyped_storage()._cdata for t in given}
        for tensor in made:
            if (storage := tensor.untyped_storage())._cdata not in before:  # which may be a parameter's
                self._follow(storage)
        inside = INSIDE[name](*args) if name in INSIDE else 0.0
        self.alive.append(self.live)
        self.inside.append(inside)
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in before for t in made)
        if name not in _STILL and not is_view:
            self.traffic += sum(t.numel() * t.element_size() for t in (*given, *made))
        return out

    def _follow(self, storage: Any) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _AsOnCuda(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        if func is F.rms_norm:
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            return _Norm.apply(args[0], args[0].new_ones(args[0].shape[-1:]) if weight is None else weight)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Saves and allocates what torch's fused kernels do: q, k, v, the output and its log-sum-exp; backward, a float32
    sum of q's gradient."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # (B, T, H, d) in memory, as the kernels have it
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        total = torch.empty_like(q, dtype=torch.float32)  # noqa: F841 - held while the others are made
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Norm(torch.autograd.Function):
    """As aten's `_fused_rms_norm`: saves x, weight and one float32 number a token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return grad * x, torch.empty_like(weight)


def _gather(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    return x.new_empty(*x.shape[:dim], x.shape[dim] * axis.size, *x.shape[dim + 1 :])


def _scatter(x: torch.Tensor, axis: Axis, dim: int = 0) -> torch.Tensor:
    return x.new_empty(*x.shape[:dim], x.shape[dim] // axis.size, *x.shape[dim + 1 :])


@contextmanager
def _fakes() -> Iterator[None]:
    silent = mock.patch.multiple(
        collectives, gather_parts=_gather, scatter_sum=_scatter, _sum=lambda x, axis: torch.empty_like(x)
    )
    flash = mock.patch.object(attention_block, "_is_flash", lambda *_: True)  # whose operators have fakes
    with FakeTensorMode(), silent, flash, torch.enable_grad():
        yield


def block_footprint(options: ModelOptions, mixer: str, tp: int, dtype: torch.dtype, length: int = TOKENS) -> Footprint:
    """Of a block with that mixer, one rank's part of it.

    Most mixers take as much for many rows as for few that are as many times longer. A memory has large states of every
    row, and keeps some of its chunks' by the root of their number: its rows are as long as the recipe's, unless torch
    loops over their chunks, which would take minutes.

    Args:
        options: resolved.
        dtype: of parameters and activations.
        length: tokens of a row, before tensor-parallel ranks share them.

    Raises:
        ValueError: the model's sizes do not divide among `tp` ranks.
    """
    found = _block(options, mixer, tp, dtype, TOKENS)
    if isinstance(getattr(options, mixer), NeuralMemoryOptions) and found.forward.operators(1) <= LOOPS:
        return _block(options, mixer, tp, dtype, length)
    return found


@lru_cache(maxsize=256)
def _block(options: ModelOptions, mixer: str, tp: int, dtype: torch.dtype, length: int) -> Footprint:
    single = replace(options, num_hidden_layers=1, layer_pattern=(mixer,), depth=None)
    return trace(single, tp, dtype, lambda body, layout, like: partial(body.layers[0], layout=layout), length)


def trace(
    options: ModelOptions,
    tp: int,
    dtype: torch.dtype,
    part: Callable[[Any, Layout, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]],
    length: int = TOKENS,
) -> Footprint:
    """Of a part of a model with these options, one rank's.

    Args:
        part: (the model between tokens and head, layout, a hidden state) → the function to trace, of a hidden state.
        length: tokens of a row.
    """
    row = length // tp * tp
    passes, kept, entered = [], [], []
    for rows in (2, 3):  # of one row some copies are none
        with _fakes():
            body, layout = _shard(options, tp, dtype).model, _layout(options, rows, row, dtype)
            shape = (rows, row, options.hidden_size) if tp == 1 else (rows * row // tp, options.hidden_size)
            passes.append(_run(part(body, layout, torch.empty(shape, dtype=dtype)), shape, dtype))
        kept.append(passes[-1][2])
        entered.append(prod(shape) * dtype.itemsize)
    forward, backward = (_back(_join(two, three)) for two, three in zip(passes[0][:2], passes[1][:2]))
    return Footprint(row, forward, backward, *(_one_and_two(np.array(n, float)) for n in (kept, entered)))


def head_footprint(options: ModelOptions, tp: int, dtype: torch.dtype, tokens: int) -> Footprint:
    """Of the final norm, the head and the loss, for about so many tokens.

    Logits are computed a chunk of tokens at a time: up to three chunks are traced as they are, and more follow the line
    through two and three. Under tensor parallelism a rank's norm has its part of the tokens.
    """
    chunk = max(1, CHUNK_BYTES_OF_GPU // (4 * options.vocab_size // tp)) // tp * tp or tp
    if tokens <= 3 * chunk:
        return _head(options, tp, dtype, tokens)
    two, three = (_head(options, tp, dtype, n * chunk) for n in (2, 3))

    def line(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return _one_and_two(np.stack([a[..., 0], b[..., 0]], axis=-1))

    def through(a: Pass, b: Pass) -> Pass:
        peak = line(a.alive.max(0), b.alive.max(0))[None]
        return Pass(peak, a.inside[:1], line(a.traffic, b.traffic), line(a.count, b.count))

    forward, backward = through(two.forward, three.forward), through(two.backward, three.backward)
    return Footprint(chunk, forward, backward, line(two.kept, three.kept), line(two.input, three.input))


@lru_cache(maxsize=256)
def _head(options: ModelOptions, tp: int, dtype: torch.dtype, tokens: int) -> Footprint:
    with _fakes():
        norm = RMSNorm(options.hidden_size, options.norm_eps)
        weight = nn.Parameter(torch.empty(options.vocab_size // tp, options.hidden_size, dtype=dtype))
        norm.weight = nn.Parameter(torch.empty(options.hidden_size, dtype=dtype))
        targets = torch.zeros(tokens, dtype=torch.int64)
        _free_gradients(norm.weight, weight)

        def loss(x: torch.Tensor) -> torch.Tensor:
            if tp == 1:
                out = linear_cross_entropy(norm(x), weight, targets, z_loss=1.0)
            else:
                out = sharded_cross_entropy(norm(x), weight, targets, Axis(tp), z_loss=1.0, ignore_index=-100)
            return out.loss + out.z_loss

        shape = tokens // tp, options.hidden_size
        forward, backward, kept = _run(loss, shape, dtype)
    saved, entered = (np.array([n, n], float) for n in (kept, prod(shape) * dtype.itemsize))
    return Footprint(tokens, _join(forward, forward), _join(backward, backward), saved, entered)


def _one_and_two(of_two_and_three: np.ndarray) -> np.ndarray:
    """Of what is affine in rows (..., 2)."""
    two, three = of_two_and_three[..., 0], of_two_and_three[..., 1]
    return np.stack([2 * two - three, two], axis=-1)


def _back(found: Pass) -> Pass:
    return Pass(*(_one_and_two(x) for x in (found.alive, found.inside, found.traffic, found.count)))


_Recorded = tuple[list[int], list[float], int]


def _run(function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype):
    """Forward and backward: what each recorded, and the bytes between them."""
    with _AsOnCuda(), _Recorder() as recorder:
        x = torch.empty(shape, dtype=dtype).requires_grad_()
        y = function(x)
        forward = recorder.alive, recorder.inside, recorder.traffic
        like, edge = (y.shape, y.dtype), torch.autograd.graph.get_gradient_edge(y)
        del y  # it is the next block's input, and counts there
        kept = recorder.live
        recorder.begin()
        torch.autograd.backward([edge], [torch.empty(like[0], dtype=like[1])])
        return forward, (recorder.alive, recorder.inside, recorder.traffic), kept


def _join(one: _Recorded, two: _Recorded) -> Pass:
    assert len(one[0]) == len(two[0]), "the operators depend on the number of rows"
    alive, inside = (np.stack([one[i], two[i]], axis=-1).astype(float) for i in (0, 1))
    count = np.array([len(alive)] * 2, float)
    return Pass(alive + inside, inside, np.array([one[2], two[2]], float), count)


def _shard(options: ModelOptions, tp: int, dtype: torch.dtype):
    """The model with one rank's parameters, cut as `build_sharded` cuts them, in the types that stage 1 gives them."""
    model = meta_model(RiverrunConfig.from_options(options))
    plan = parameter_plan(model, tp)
    splits = {param: plan[name] for name, param in model.named_parameters()}
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            split = splits[param]
            shape = param.shape if split is None else split.shape(param.shape, tp)
            kind = torch.float32 if getattr(param, "keep_fp32", False) else dtype
            module._parameters[name] = nn.Parameter(torch.empty(shape, dtype=kind, device="cpu"))
        if tp > 1 and hasattr(module, "tp"):
            module.tp = Axis(tp)  # type: ignore[assignment]
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    _free_gradients(*model.parameters())
    return model


def _free_gradients(*params: nn.Parameter) -> None:
    """As the engine's hooks do: a gradient is added to a float32 buffer once it is there, and freed."""

    def free(param: torch.Tensor) -> None:
        param.grad = None

    for param in params:
        param.register_post_accumulate_grad_hook(free)


def _layout(options: ModelOptions, rows: int, length: int, dtype: torch.dtype) -> Layout:
    """Rows of one document each: packed ones take the same, but in memories, which have a state of each document. What
    can be read as a prefix is."""
    layout = Layout.of_rows((rows, length), torch.zeros(rows, dtype=torch.int64))
    if options.reads_prefix:
        layout.prefix = torch.ones(rows, length, dtype=torch.bool)
    if options.attention.rope:
        layout.rope = rotary_tables(layout.positions, options.attention.head_dim, options.attention.rope_theta, dtype)
    return layout
