"""Sizes of launches. Triton's functions of the same purpose are made for kernels: on the host they take some 10 µs."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2_from(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()
