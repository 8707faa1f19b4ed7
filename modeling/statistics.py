"""What layers note of themselves in training since they were last asked: sums on the device, read when taken.

Sums stay tensors until `take_noted`, so that noting waits for no device; so do counts that are tensors.
"""

import torch

_sums: dict[str, list[torch.Tensor | float]] = {}


@torch.no_grad()
def note(name: str, value: torch.Tensor, count: torch.Tensor | float = 1.0) -> None:
    """A sum, a scalar on any device, of so many things."""
    if type(value) is not torch.Tensor:  # one without memory, of those who look what a model allocates
        return
    new = value.detach().double(), count.double() if isinstance(count, torch.Tensor) else count
    _sums[name] = [a + b for a, b in zip(_sums[name], new)] if name in _sums else list(new)


def take_noted() -> dict[str, list[float]]:
    """Of each name [sum, count], and start anew."""
    tensors = [x for pair in _sums.values() for x in pair if isinstance(x, torch.Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    taken = {name: [next(values) if isinstance(x, torch.Tensor) else x for x in pair] for name, pair in _sums.items()}
    _sums.clear()
    return taken
