"""Triton kernels check themselves where they run: compilers have miscompiled kernels like ours on one card and not on
another. The first use of an op with given sizes computes a small case in Triton and in chunked torch; what agreed once
is remembered beside Triton's cache, for this card, this Triton and these sources.

An op checks where its operator runs, below autograd and torch.compile, and calls its launchers for it, not itself.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch

INTERPRETED_TOO = False  # to test the checks themselves

_agreed: set[object] = set()


def is_due(x: torch.Tensor) -> bool:
    """Whether an op of this tensor is to check its kernels: those that are compiled, not interpreted."""
    return x.is_cuda or INTERPRETED_TOO


def check_once(
    op: str, sizes: dict[str, object], device: torch.device, deviation: Callable[[], float], tolerance: float
) -> None:
    """Call `deviation`, the relative difference of the two forms, unless it has been small before.

    It is called in a thread of its own, which has none of the caller's modes: inference, autocast, tracing, or a
    checkpoint's hooks, which would run the caller again.

    Raises:
        RuntimeError: the forms differ by more than `tolerance`.
    """
    quick = (op, device, *sizes.items())
    if quick in _agreed:
        return
    where = f"{_card(device)}, Triton {_triton()}"
    case = f"{op} with {', '.join(f'{name}={size}' for name, size in sizes.items())}"
    key = hashlib.sha256("\n".join((case, where, _sources())).encode()).hexdigest()
    record = _folder() / f"{key}.json"
    if not record.exists():
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(_apart, deviation, device).result()
        if not found <= tolerance:
            raise RuntimeError(
                f"{case}: on this machine ({where}) the Triton kernels differ from the chunked form by {found:.1e} of "
                f"its norm, where at most {tolerance:.0e} is rounding. Do not use them: pass backend='chunked', or try "
                "another version of Triton or of its assembler (riverrun doctor); please report it."
            )
        record.parent.mkdir(parents=True, exist_ok=True)
        draft = record.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"case": case, "where": where, "deviation": found}))
        draft.replace(record)
    _agreed.add(quick)


def deviation(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest of the relative differences ‖a − b‖ / ‖b‖; not a number if any of them is not."""
    pairs = [(widest(a), widest(b)) for a, b in zip(got, want, strict=True)]
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-12) for a, b in pairs]).max().item()


def rounding(dtype: torch.dtype) -> float:
    """What rounding may make of kernels that take and give numbers of this type and compute in float32."""
    return 1e-4 if dtype in (torch.float32, torch.complex64) else 2e-2


def draws(device: torch.device) -> Callable[..., torch.Tensor]:
    """`torch.randn` with numbers of its own, the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    return functools.partial(torch.randn, generator=generator, device=device, dtype=torch.float32)


def widest(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float64))


def in_double(
    form: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor | None], upstream: torch.Tensor | None
) -> list[torch.Tensor]:
    """The outputs of `form` in double precision and, if there is an `upstream` gradient of the first, the gradients of
    the inputs that are there."""
    inputs = [x if x is None else widest(x).detach().requires_grad_() for x in inputs]
    outputs = form(*inputs)
    if upstream is None:
        return [x.detach() for x in outputs]
    leaves = [x for x in inputs if x is not None]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs[0], leaves, widest(upstream))]


def _apart(compare: Callable[[], float], device: torch.device) -> float:
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    # gradients within this thread: autograd's own may be what waits for it
    with on_device, torch.autograd.set_multithreading_enabled(False):
        return compare()


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


@functools.cache
def _triton() -> str:
    import triton

    return triton.__version__


@functools.cache
def _sources() -> str:
    """A digest of all Triton sources."""
    here = Path(__file__)  # in a checkpoint's remote code, beside all others
    files = sorted({*here.parents[1].glob("*/triton_*.py"), *here.parent.glob("*_triton_*.py")})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir) / "riverrun-self-checks"
