"""Compile Triton kernels for Hopper (sm_90) or Ampere (sm_80) without a GPU, exactly as their launchers would start
them there.

A file of launches, say `launches_para.py`, defines functions `launch_…()` that call the launchers (below the public
ops, which insist on CUDA tensors) with CPU tensors. Here every start of a kernel is turned into a compilation; nothing
runs. Triton's interpreter must be off, which the tests have on: hence a process of its own.

    python tests/kernels/compiling.py tests/kernels/launches_para.py [80]     prints one JSON object a kernel
"""

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED_LIMIT, SHARED_LIMIT_OF_AMPERE = 232_448, 166_912  # bytes a program may use


def compile_for_hopper(launches: Path) -> list[dict]:
    return _compile_apart(launches, "90")


def compile_for_ampere(launches: Path) -> list[dict]:
    return _compile_apart(launches, "80")


CARDS = {"sm_90": (compile_for_hopper, SHARED_LIMIT), "sm_80": (compile_for_ampere, SHARED_LIMIT_OF_AMPERE)}


def _compile_apart(launches: Path, capability: str) -> list[dict]:
    """One dict a compiled kernel: launch, kernel, num_warps, registers, stack (bytes: spills), shared (bytes), ptx."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(launches), capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _compile(launches: str, capability: str = "90") -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """What Triton asks of a driver until a kernel is loaded."""

        def get_current_target(self):
            return GPUTarget("cuda", int(capability), 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(Driver())
    start, launch, seen = triton.JITFunction.run, "", set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = start(self, *args, grid=grid, warmup=True, **kwargs)
        if (launch, kernel.hash) not in seen:
            seen.add((launch, kernel.hash))
            print(json.dumps({"launch": launch, "kernel": self.__name__} | _resources(kernel)), flush=True)
        return kernel

    triton.JITFunction.run = compile_only
    for launch, function in runpy.run_path(launches).items():
        if launch.startswith("launch_"):
            function()


def _resources(kernel) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    ttgir = kernel.asm["ttgir"]
    return {
        "num_warps": kernel.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "wgmma": ttgir.count("warp_group_dot "),
        "converts": ttgir.count("convert_layout"),
    }


if __name__ == "__main__":
    _compile(*sys.argv[1:])
