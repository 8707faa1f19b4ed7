"""A pseudo-random order of any number of items that needs no memory: a keyed permutation of {0, …, n − 1}."""

import hashlib


class Permutation:
    """A bijection of range(size), drawn by `key`.

    A four-round Feistel network over the next power of four, with cycle walking: an image outside the range is
    permuted again until it falls inside, at most four tries on average. Keyed BLAKE2 is the round function.
    """

    ROUNDS = 4

    def __init__(self, size: int, *key: int):
        assert size > 0
        self.size = size
        self.half_bits = max(1, (((size - 1).bit_length()) + 1) // 2)
        self.mask = (1 << self.half_bits) - 1
        key_bytes = b"".join(part.to_bytes(8, "little") for part in key)
        # keys that are copied cost less than keys that are hashed in each round
        self._hashers = [
            hashlib.blake2b(key_bytes, digest_size=8, salt=bytes([round_])) for round_ in range(self.ROUNDS)
        ]

    def __call__(self, i: int) -> int:
        """The item at place `i` of the order."""
        assert 0 <= i < self.size
        while True:
            left, right = i >> self.half_bits, i & self.mask
            for hasher in self._hashers:
                left, right = right, left ^ self._round(hasher, right)
            i = left << self.half_bits | right
            if i < self.size:
                return i

    def _round(self, hasher, value: int) -> int:
        h = hasher.copy()
        h.update(value.to_bytes(8, "little"))
        return int.from_bytes(h.digest(), "little") & self.mask
