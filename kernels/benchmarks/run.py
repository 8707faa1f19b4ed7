"""Runs a benchmark: every contender on one case, and sweeps over sequence lengths and heads."""

import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from riverrun.kernels.benchmarks.benchmark import Benchmark, Case, Contender, Inputs, Load, Unavailable, Work
from riverrun.kernels.benchmarks.timing import Time, call_seconds, free_memory, measure_time, peak_memory
from riverrun.kernels.common.shooting import take_statistics

SEED = 0
REFERENCE_LENGTH = {"cpu": 512, "cuda": 4096}  # tokens that the step loop in float64 runs for, at most
REFERENCE_NUMBERS = 40  # that autograd keeps of it for an element, about
SLOWEST_CALL = 1000.0  # ms: a contender whose forward or backward takes longer is left out of the longer sequences


@dataclass
class Result:
    """What was measured of one contender; times in milliseconds, memory in bytes.

    Attributes:
        name, note: of the contender.
        skipped: why it was not measured, or None.
        error: the relative error against float64 of the output, and the worst of the gradients', at T = `error_len`.
        solver: what the forward solve did, where there is one.
        first_call: seconds, compilation included: forward alone, then with its backward pass.
    """

    name: str
    note: str = ""
    skipped: str | None = None
    forward: Time | None = None
    backward: Time | None = None
    layer: Time | None = None
    forward_memory: int | None = None
    backward_memory: int | None = None
    layer_memory: int | None = None
    first_call: float | None = None
    error: dict[str, float] = field(default_factory=dict)
    error_len: int | None = None
    solver: dict[str, float] | None = None


def compare(
    benchmark: Benchmark, case: Case, regime: str, load: Load, *, repeats: int, only: tuple[str, ...] = ()
) -> Iterator[Result]:
    """Measure all contenders on the same inputs, one after the other. One that raises does not stop the rest.

    Args:
        only: the names, or beginnings of names, of the contenders to measure; empty: all.

    Raises:
        ValueError: `only` names no contender, or the inputs cannot be made.
    """
    inputs = make_inputs(benchmark, case, regime)
    truth: list[tuple[Case, Inputs, list[torch.Tensor]]] = []  # made when it is first needed

    def measure(contender: Contender, result: Result) -> None:
        _measure(benchmark.name, contender.build(inputs, case, load), case.device, repeats, result)
        if not contender.same_maths:
            return
        if not truth:
            truth.append(_truth(benchmark, inputs, case))
        short, cut, exact = truth[0]
        result.error = _errors(_outcome(contender.build(cut, short, load), case.dtype), exact)
        result.error_len = short.T

    for contender in select(benchmark.contenders(case), only):
        result = Result(contender.name, contender.note)
        torch.cuda.empty_cache()  # what others load takes memory past torch's allocator
        result.skipped = unavailable(contender, case) or attempt(measure, contender, result)
        yield result


def lengths(case: Case, shortest: int, longest: int) -> list[Case]:
    """T = shortest, twice that, … up to longest, at a constant number of tokens: B = max(1, B · T // length) rows."""
    tokens, found = case.B * case.T, []
    while shortest <= longest:
        found.append(replace(case, T=shortest, B=max(1, tokens // shortest)))
        shortest *= 2
    return found


def head_shapes(benchmark: Benchmark, case: Case) -> list[Case]:
    """Few wide heads to many narrow ones, at the same width in all."""
    return [replace(case, H=heads) for heads in benchmark.head_counts if case.D % heads == 0]


def sweep(
    benchmark: Benchmark, shapes: list[Case], load: Load, *, repeats: int, only: tuple[str, ...] = ()
) -> Iterator[tuple[Case, list[Result]]]:
    """Forward and backward times over shapes. A contender that is too slow at one is left out of those that follow."""
    too_slow = dict[str, str]()

    def measure(contender: Contender, shape: Case, inputs: Inputs, result: Result) -> None:
        work = contender.build(inputs, shape, load)
        forward = torch.no_grad()(work.forward)
        result.forward = measure_time(forward, shape.device, repeats)
        result.backward = measure_time(_backward(work, _upstream(forward())), shape.device, repeats)

    for shape in shapes:
        contenders = select(benchmark.contenders(shape), only)
        free, need = free_memory(shape.device), estimated_bytes(benchmark, shape)
        if free is not None and need > free:
            reason = f"left out: about {need >> 30} GiB needed, {free >> 30} GiB free"
            yield shape, [Result(c.name, c.note, reason) for c in contenders]
            continue
        inputs, results = make_inputs(benchmark, shape, next(iter(benchmark.regimes))), []
        for contender in contenders:
            result = Result(contender.name, contender.note, unavailable(contender, shape))
            results.append(result)
            if contender.name in too_slow:
                result.skipped = f"left out: over {SLOWEST_CALL:.0f} ms a call at {too_slow[contender.name]}"
            if result.skipped:
                continue
            result.skipped = attempt(measure, contender, shape, inputs, result)
            if max((t.median for t in (result.forward, result.backward) if t), default=0) > SLOWEST_CALL:
                too_slow[contender.name] = f"T={shape.T}, {shape.H} heads"
        yield shape, results
        inputs.clear()  # before the next ones are made


def select(contenders: list[Contender], only: tuple[str, ...]) -> list[Contender]:
    """
    Raises:
        ValueError: a name in `only` that is the beginning of no contender's.
    """
    for name in only:
        if not any(c.name.startswith(name) for c in contenders):
            raise ValueError(f"no contender is called {name!r}; choose among {', '.join(c.name for c in contenders)}")
    return [c for c in contenders if not only or c.name.startswith(only)]


def unavailable(contender: Contender, case: Case) -> str | None:
    if contender.needs_cuda and case.device.type != "cuda":
        return "needs CUDA"
    if contender.min_len > case.T:
        return f"left out below T={contender.min_len}"
    if contender.max_len is not None and contender.max_len < case.T:
        return f"left out beyond T={contender.max_len}, which would take too long"
    return None


def attempt(measure: Callable[..., None], *arguments: Any) -> str | None:
    """Run it; what it raises becomes a line of the table."""
    try:
        measure(*arguments)
    except Unavailable as reason:
        return str(reason)
    except ModuleNotFoundError as missing:
        return f"not installed: {missing.name}"
    except Exception as error:
        # its frames hold tensors, which the next contender may need the memory of
        traceback.clear_frames(error.__traceback__)
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return None


def make_inputs(benchmark: Benchmark, case: Case, regime: str) -> Inputs:
    torch.manual_seed(SEED)
    with torch.no_grad():
        inputs = benchmark.inputs(case, regime)
    return leaves(inputs)


def leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """New tensors, those of a floating-point type requiring gradients, and in `dtype` if one is given."""
    return {
        name: x.detach().to(dtype or x.dtype).requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }


def reference_length(case: Case) -> int:
    """The tokens that the step loop in float64 runs for: all, unless it would take too long or half of the memory."""
    length, free = min(case.T, REFERENCE_LENGTH[case.device.type]), free_memory(case.device)
    if free is None:
        return length
    return max(1, min(length, free // 2 // (8 * REFERENCE_NUMBERS * case.B * case.D)))


def estimated_bytes(benchmark: Benchmark, case: Case) -> int:
    """The inputs, the results and gradients of one contender, and float32 states: rather too little than too much."""
    numbers = benchmark.forward_numbers(case) + 1 + 2 * benchmark.backward_numbers(case)
    return int(case.elements * (numbers * case.dtype.itemsize + 4))


def _measure(op: str, work: Work, device: torch.device, repeats: int, result: Result) -> None:
    forward = torch.no_grad()(work.forward)
    take_statistics()
    result.first_call = call_seconds(forward, device)
    solved = take_statistics().get(op)
    if solved is not None:
        result.solver = vars(solved)
    upstream = _upstream(forward())

    def both() -> None:
        _backward(work, upstream)()

    result.first_call += call_seconds(both, device)
    result.forward_memory = peak_memory(forward, device)
    result.backward_memory = peak_memory(both, device)
    result.forward = measure_time(forward, device, repeats)
    result.backward = measure_time(_backward(work, upstream), device, repeats)
    if work.layer is not None:

        def layer() -> None:
            assert work.layer is not None
            torch.autograd.grad(work.layer(), work.layer_leaves, upstream)

        layer()  # compiles
        result.layer_memory = peak_memory(layer, device)
        result.layer = measure_time(layer, device, repeats)


def _backward(work: Work, upstream: torch.Tensor) -> Callable[[], object]:
    """Runs the forward pass; the result repeats its backward pass."""
    h = work.forward()
    if work.backward is not None:
        backward = work.backward
        return lambda: backward(upstream)
    return lambda: torch.autograd.grad(h, work.leaves, upstream, retain_graph=True)


def _upstream(h: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """dL/dh: the same numbers for every contender, rounded to `dtype`."""
    generator = torch.Generator(h.device).manual_seed(SEED + 1)
    return torch.randn(h.shape, generator=generator, device=h.device).to(dtype or h.dtype).to(h.dtype)


def _outcome(work: Work, dtype: torch.dtype) -> list[torch.Tensor]:
    """h and, unless the backward pass is not autograd's, the gradients of the reference's leaves."""
    if work.backward is not None:
        return [work.forward().detach()]
    h = work.forward()
    grads = torch.autograd.grad(h, work.leaves, _upstream(h, dtype))
    return [h.detach(), *(grads if work.arrange is None else work.arrange(grads))]


def _truth(benchmark: Benchmark, inputs: Inputs, case: Case) -> tuple[Case, Inputs, list[torch.Tensor]]:
    """The case cut to as many tokens as there is time and memory for, its inputs, and the outcome in float64."""
    short = replace(case, T=reference_length(case))
    while True:
        cut = inputs if short.T == case.T else _cut(inputs, benchmark.sequences, short.T)
        try:
            exact = _outcome(benchmark.reference(leaves(cut, torch.float64), short), case.dtype)
            torch.cuda.empty_cache()
            return short, cut, exact
        except torch.OutOfMemoryError as error:  # autograd kept more than was estimated
            if short.T == 1:
                raise
            traceback.clear_frames(error.__traceback__)
            short = replace(short, T=short.T // 2)


def _errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> dict[str, float]:
    """‖x − x₆₄‖ / ‖x₆₄‖ of the output, and the worst of the gradients'."""
    errors = [((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(got, want)]
    return {"output": errors[0]} | ({"gradients": max(errors[1:])} if errors[1:] else {})


def _cut(inputs: Inputs, sequences: tuple[str, ...], T: int) -> Inputs:
    """The first T tokens."""
    return leaves({name: x[:, :T].contiguous() if name in sequences else x for name, x in inputs.items()})
