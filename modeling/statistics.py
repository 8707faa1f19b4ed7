"""What layers note of themselves in training since they were last asked: sums on the device, read when taken.

A name's sum and count stay tensors until `take_noted`, so that noting waits for no device.
"""

import torch

_sums: dict[str, list[torch.Tensor]] = {}


@torch.no_grad()
def note(name: str, value: torch.Tensor, count: torch.Tensor | float = 1.0) -> None:
    """A sum, a scalar on any device, of so many things."""
    if type(value) is not torch.Tensor:  # one without memory, of those who look what a model allocates
        return
    many = count if isinstance(count, torch.Tensor) else torch.full_like(value, count, dtype=torch.float64)
    new = value.detach().double(), many.double()
    _sums[name] = [a + b for a, b in zip(_sums[name], new)] if name in _sums else list(new)


def take_noted() -> dict[str, list[float]]:
    """Of each name [sum, count], and start anew."""
    names = list(_sums)
    values = torch.stack([x for name in names for x in _sums[name]]).tolist() if names else []
    _sums.clear()
    return dict(zip(names, map(list, zip(values[::2], values[1::2]))))
