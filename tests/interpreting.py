"""Triton's interpreter without what it does over and over: the same results in about half of the time.

It puts its functions in the language's place at every call of a device function, and takes them away after every
kernel; it widens each sum of integers to 64 bits to see whether it overflows, and then drops what it saw (that is
asserted in debug mode only); it makes a dictionary of all types to look one up.
"""

import dataclasses
from types import SimpleNamespace

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
