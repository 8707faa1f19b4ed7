"""Groups of ranks that stay alive for a whole file of tests, so that most distributed tests cost no start-up."""

import functools
import gc
import io
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

from riverrun.modeling.parallel.mesh import Mesh

# imported once, in the server that forks the ranks; a session has one, so that these are training's ranks' too
PRELOAD = [
    "torch.distributed.device_mesh", "riverrun.modeling.model", "deepspeed.runtime.engine", "matplotlib.pyplot",
    "riverrun.train.loop", "tests.preloaded",
]  # fmt: skip


def meeting_place() -> dist.TCPStore:
    """Where the ranks of one group find each other, for as long as it is kept. It takes its port itself: one that is
    only known to be free may be another's by the time that rank 0 listens there."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meet_at(port: int) -> None:
    """On a rank: the process group is to meet at its parent's store, as under torchrun."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")


class Group:
    """`world` processes of one process group, each of which runs what it is told to and sends back the result.

    Over gloo on the CPU, or over NCCL with a GPU each.
    """

    def __init__(self, world: int, backend: str = "gloo"):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.store = meeting_place()
        self.pipes, self.processes = [], []
        # for the server, to which Python 3.11 does not hand on the path
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
            for rank in range(world):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, rank, world, self.store.port, backend), daemon=True
                )
                process.start()
                self.pipes.append(ours)
                self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank alike; its results, by rank. It must be importable by its module's name.

        Raises:
            AssertionError: a rank raised something; its traceback is the message.
        """
        payload = pickle.dumps((function.__module__, function.__qualname__, args))
        for pipe in self.pipes:
            pipe.send_bytes(payload)
        results = [torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False) for pipe in self.pipes]
        failures = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(results) if error]
        assert not failures, "\n".join(failures)
        return [value for value, _ in results]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


@functools.cache
def mesh(cp: int = 1, tp: int = 1, device: str = "cpu") -> Mesh:
    """On a rank: the mesh, made once, because every new process group costs each rank threads and connections."""
    return Mesh.of(device, dist.get_world_size(), cp=cp, tp=tp)


def _serve(pipe, rank: int, world: int, port: int, backend: str) -> None:
    torch.set_num_threads(1)
    meet_at(port)
    # when one rank fails, the others wait that long for it before they fail too
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    while True:
        try:
            module, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        gc.collect()
        gc.freeze()  # so that the eight collections for each of DeepSpeed's engines have little to look through
        try:
            function = __import__(module, fromlist=[name])
            for part in name.split("."):
                function = getattr(function, part)
            result = function(*args), None
        except BaseException:
            result = None, traceback.format_exc()
        answer = io.BytesIO()
        torch.save(result, answer)
        pipe.send_bytes(answer.getvalue())
