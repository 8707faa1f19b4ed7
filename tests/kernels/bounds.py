"""Every access of a Triton kernel under the interpreter must lie within a tensor that the kernel was given.

The interpreter takes addresses as they come: a wrong mask then reads whatever lies there, or writes over it.
"""

import numpy as np
from triton.runtime import interpreter


class _Spans:
    """The memory of the tensors of the kernel that runs, as disjoint ranges of bytes in order."""

    starts = ends = np.zeros(0, np.uint64)
    kernel = ""

    @classmethod
    def of(cls, kernel: str, tensors: list) -> None:
        spans: list[list[int]] = []
        for begin, end in sorted((t.data_ptr(), _end(t)) for t in tensors if t.numel()):
            if spans and begin <= spans[-1][1]:
                spans[-1][1] = max(end, spans[-1][1])
            else:
                spans.append([begin, end])
        cls.starts, cls.ends = np.array(spans, np.uint64).reshape(-1, 2).T
        cls.kernel = kernel

    @classmethod
    def check(cls, pointers, mask) -> None:
        at = np.asarray(pointers.data, np.uint64)[np.asarray(mask.data, bool)]
        if not at.size:
            return
        size = np.uint64(max(8, pointers.get_element_ty().primitive_bitwidth) // 8)
        span = np.searchsorted(cls.starts, at, side="right").astype(int) - 1
        outside = (span < 0) | (at + size > cls.ends[np.maximum(span, 0)])
        if outside.any():
            raise IndexError(f"{cls.kernel}: {outside.sum()} of {at.size} accesses lie outside of its tensors")


def _end(tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr() + (reach + 1) * tensor.element_size()


def check_accesses() -> None:
    """From now on, in this process."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def prepare_and_note(self, args, options):
        prepared = prepare(self, args, options)
        tensors = [x for x in (*prepared[0], *prepared[1].values()) if hasattr(x, "data_ptr")]
        _Spans.of(self.fn.__name__, tensors)
        return prepared

    def checked_load(self, pointers, mask, *rest):
        _Spans.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        _Spans.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = prepare_and_note
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
