"""Runs in several processes: small models leave a GPU idle between the launches of their kernels."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

import torch

from riverrun.eval.studies.run import Result, Run
from riverrun.eval.studies.trainer import train

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized


def train_side_by_side(runs: list[Run], device: torch.device, jobs: int) -> Iterator[tuple[Run, Result]]:
    """Each run with its result, as they end; `jobs` at a time, in processes that share the device and the CPU's cores.
    On "cuda", without a number, the processes are dealt to all GPUs.

    Raises:
        RuntimeError: after all the others ended, if runs failed; says which.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    number = context.Value("i", 0)
    pool = ProcessPoolExecutor(min(jobs, len(runs)), context, _start_worker, (jobs, device, number))
    failures: list[str] = []
    try:
        futures = {pool.submit(train, run, device): run for run in runs}
        for future in as_completed(futures):
            run = futures[future]
            if error := future.exception():
                words = str(error) or type(error).__name__
                failures.append(f"{run.mixer}, learning rate {run.learning_rate:g}, seed {run.seed}: {words}")
            else:
                yield run, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        ended = f"{len(failures)} of {len(runs)} runs failed; the others are kept, and the same command goes on"
        raise RuntimeError(f"{ended}: {'; '.join(failures)}")


def _start_worker(jobs: int, device: torch.device, number: "Synchronized[int]") -> None:
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores // jobs)))
    with number.get_lock():
        mine = number.value
        number.value += 1
    if device.type == "cuda":
        torch.cuda.set_device(mine % torch.cuda.device_count() if device.index is None else device)
