"""Programs of a kernel that run at the same time under Triton's interpreter, which runs one after another: threads, for
kernels whose programs wait for each other."""

import inspect
import sys
import threading

from triton.runtime import interpreter


class _Together:
    """Stands for a kernel's function: the call for the first program runs all of them, the others nothing."""

    def __init__(self, function):
        self.function, self.__signature__ = function, inspect.signature(function)
        for name in ("__name__", "__annotations__", "__globals__"):  # which the interpreter looks at
            setattr(self, name, getattr(function, name))

    def __call__(self, **arguments):
        builder, failures = interpreter.interpreter_builder, []
        if builder.grid_idx[0] > 0:
            return

        def program(number):
            try:
                builder.set_grid_idx(number, 0, 0)
                self.function(**arguments)
            except Exception as error:  # to be raised in the thread that a test runs in
                failures.append(error)

        threads = [threading.Thread(target=program, args=(n,), daemon=True) for n in range(builder.grid_dim[0])]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(interval / 50)  # those that wait take turns with those that work
        for thread in threads:
            thread.start()
        while not failures and any(thread.is_alive() for thread in threads):  # the others wait for one that failed
            threads[-1].join(0.01)
        sys.setswitchinterval(interval)
        if failures:
            raise failures[0]


def run_together(monkeypatch, *kernels):
    """From here on, the programs of these kernels run at the same time."""
    own = threading.local()
    of_thread = property(lambda builder: own.at, lambda builder, at: setattr(own, "at", at))
    monkeypatch.setattr(type(interpreter.interpreter_builder), "grid_idx", of_thread, raising=False)
    for kernel in kernels:
        monkeypatch.setattr(kernel, "rewrite", lambda rewrite=kernel.rewrite: _Together(rewrite()))
