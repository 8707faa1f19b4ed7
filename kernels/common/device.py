"""What kernels' launches ask of a device."""

import torch


def multiprocessors(x: torch.Tensor) -> int:
    """Of the device of `x`; a Hopper's number where there is none, as under Triton's interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132
