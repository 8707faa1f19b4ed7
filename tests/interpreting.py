"""Triton's interpreter without what it does over and over: the same results in less than half of the time.

It puts its functions in the language's place at every call of a device function, and takes them away after every
kernel; it widens each sum of integers to 64 bits to see whether it overflows, and then drops what it saw (that is
asserted in debug mode only); it makes a dictionary of all types to look one up; it checks the shape of each block anew,
and wraps each of its sizes as a constant.
"""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """From now on, in this process, in which nothing but the interpreter may run kernels. A version of Triton whose
    inner names are others stays as slow as it is."""
    known_names = ("_patch_lang", "_get_np_dtype", "interpreter_builder")
    if not all(hasattr(interpreter, name) for name in known_names):
        return
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    look_up, known = interpreter._get_np_dtype, {}

    def numpy_type(type):
        name = type.scalar.name
        if name not in known:
            known[name] = look_up(type)
        return known[name]

    interpreter._get_np_dtype = numpy_type
    _share_shapes()


def steady_products() -> None:
    """From now on, in this process, a product's last bit does not depend on how its factors lie in memory. OpenBLAS has
    a kernel for each order, and on processors with AVX-512 they round differently."""
    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a.data, b.data = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
        return product(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _share_shapes() -> None:
    """One tuple of sizes for all blocks of a shape, and one of constants for all tensors."""
    block = tl.block_type(tl.int32, [2])
    if vars(block).keys() != {"element_ty", "shape", "numel", "name"}:
        return
    if vars(tl.tensor(None, block)).keys() != {"handle", "type", "dtype", "shape", "numel"}:
        return
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__

    @functools.cache
    def first_of(sizes: tuple[int, ...]) -> SimpleNamespace:
        """What all blocks of these sizes have in common, from one that is made, and checked, as Triton does it."""
        block = tl.block_type.__new__(tl.block_type)
        make_block(block, tl.int32, list(sizes))
        tensor = tl.tensor.__new__(tl.tensor)
        make_tensor(tensor, None, block)
        return SimpleNamespace(block=block, text=str(block.shape), tensor=tensor)

    def block_of(self, element_ty, shape):
        first = first_of(tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape]))
        self.element_ty, self.shape, self.numel = element_ty, first.block.shape, first.block.numel
        self.name, self.first = f"<{first.text}, {element_ty}>", first.tensor

    def tensor_of(self, handle, type):
        first = type.first if type.is_block() else scalar
        self.handle, self.type, self.dtype, self.shape, self.numel = handle, type, type.scalar, first.shape, first.numel

    scalar = tl.tensor(None, tl.int32)
    tl.block_type.__init__, tl.tensor.__init__ = block_of, tensor_of
