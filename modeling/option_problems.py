"""What several options check about themselves, each violation with its fix."""

from math import isqrt


def positive(mixer: str, options: object, *names: str) -> list[str]:
    return [f"{mixer}.{n}={getattr(options, n)} must be positive" for n in names if getattr(options, n) <= 0]


def not_shared(what: str, number: int, tp: int) -> list[str]:
    return [f"{what} = {number} must be a multiple of parallel.tp={tp}"] if number % tp else []


def divisor_near(n: int, wanted: int) -> int:
    """The divisor of n closest to `wanted`."""
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return min({*low, *(n // d for d in low)}, key=lambda d: (abs(d - wanted), d))
