"""Triton kernels check themselves where they run: compilers have miscompiled kernels like ours on one card and not on
another. The first use of an op with given sizes computes a small case in Triton and in chunked torch; what agreed once
is remembered beside Triton's cache, for this card, this Triton and these sources."""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

_agreed: set[str] = set()


def check_once(
    op: str, sizes: dict[str, object], device: torch.device, deviation: Callable[[], float], tolerance: float
) -> None:
    """Call `deviation`, the relative difference of the two forms, unless it has been small before.

    Raises:
        RuntimeError: the forms differ by more than `tolerance`.
    """
    where = f"{_card(device)}, Triton {_triton()}"
    case = f"{op} with {', '.join(f'{name}={size}' for name, size in sizes.items())}"
    key = hashlib.sha256("\n".join((case, where, _sources())).encode()).hexdigest()
    if key in _agreed:
        return
    record = _folder() / f"{key}.json"
    if not record.exists():
        found = deviation()
        if not found <= tolerance:
            raise RuntimeError(
                f"{case}: on this machine ({where}) the Triton kernels differ from the chunked form by {found:.1e} of "
                f"its norm, where at most {tolerance:.0e} is rounding. Do not use them: pass backend='chunked', or try "
                "another version of Triton; please report it."
            )
        record.parent.mkdir(parents=True, exist_ok=True)
        draft = record.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"case": case, "where": where, "deviation": found}))
        draft.replace(record)
    _agreed.add(key)


def deviation(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest of the relative differences ‖a − b‖ / ‖b‖; not a number if any of them is not."""
    differences = [(a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12) for a, b in zip(got, want)]
    return torch.stack(differences).max().item()


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
    files = sorted(Path(__file__).parents[1].glob("*/triton_*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir) / "riverrun-self-checks"
