"""A small run that is killed again and again ends as one that was left alone, bit for bit.

    make soak                                   60 kills, half an hour on two cores
    python -m tests.soak.kills --kills 60 --seed 0

Two ranks under torchrun, checkpoints written beside training every few steps. SIGKILL goes to a random rank, to
torchrun's agent or to all of them, at a random moment of a random step; every other time while a checkpoint is being
written. After each kill all that is left of the run is awaited, as a scheduler would, and the checkpoints are looked
through: none may be lost but the one that was being written. Prints a line for every kill, and the outcome.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch

from riverrun.launch import local
from riverrun.train import checkpoint, metrics, outcome
from tests.slurm import tiny
from tests.train.test_loop import assert_equal

EVERY, A_KILL = 4, 24  # steps between checkpoints, and on average between kills
PARTIAL = f"*{checkpoint.PARTIAL}"
VICTIMS = ("rank", "agent", "group")
LINGER = 120.0  # seconds in which whatever is left of a killed run has to be gone


def start(recipe: Path, run_dir: Path, steps: int, log: Path) -> psutil.Process:
    arguments = [
        str(recipe), f"train.steps={steps}", f"checkpoint.every={EVERY}", "train.global_batch_size=8",
        "train.log_every=10", "--run-dir", str(run_dir),
    ]  # fmt: skip
    outcome.withdraw(run_dir) if run_dir.exists() else None
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        child = subprocess.Popen(
            local.command(arguments, 2), stdout=file, stderr=file, env=environment, start_new_session=True
        )
    return psutil.Process(child.pid)


def wait_until(condition, agent: psutil.Process, log: Path) -> None:
    while not condition():
        if not alive(agent):
            raise SystemExit(f"the run ended by itself:\n{log.read_text()[-4000:]}")
        time.sleep(0.001)


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() != psutil.STATUS_ZOMBIE:
            return True
    return False


def newest(run_dir: Path) -> int:
    return max((checkpoint.step_of(c) for c in checkpoint.checkpoints(run_dir)), default=0)


def kill(victim: str, agent: psutil.Process, draw: random.Random) -> float:
    """Kills, and waits until nothing of the run is left. Returns the seconds that took."""
    ranks = agent.children()
    whole = [agent, *agent.children(recursive=True)]
    chosen = {"rank": [draw.choice(ranks)] if ranks else [agent], "agent": [agent], "group": whole}[victim]
    began = time.monotonic()
    for process in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    while any(alive(process) for process in whole):
        with contextlib.suppress(psutil.Error):
            agent.wait(0)
        if time.monotonic() - began > LINGER:
            left = [p for p in whole if alive(p)]
            raise SystemExit(f"after the {victim} was killed, these did not end: {left}")
        time.sleep(0.02)
    return time.monotonic() - began


def soak(folder: Path, kills: int, seed: int) -> None:
    draw, steps = random.Random(seed), A_KILL * (kills + 1)
    recipe = tiny.write(folder / "data")
    whole, run_dir, log = folder / "whole", folder / "killed", folder / "log"
    agent = start(recipe, whole, steps, log)
    assert agent.wait() == 0, log.read_text()[-4000:]
    print(f"uninterrupted: {steps} steps", flush=True)

    victims: Counter[str] = Counter()
    for number in range(1, kills + 1):
        before = newest(run_dir)
        agent = start(recipe, run_dir, steps, log)
        target = max(before, A_KILL * (number - 1)) + draw.randrange(EVERY, A_KILL)
        victim, writing = draw.choice(VICTIMS), number % 2 == 0
        wait_until(lambda target=target: newest(run_dir) >= target - EVERY, agent, log)
        if writing:
            wait_until(lambda: any(checkpoint.folder_of(run_dir).glob(PARTIAL)), agent, log)
            time.sleep(draw.uniform(0, 0.02))
        else:
            time.sleep(draw.uniform(0, 0.2))
        seen = checkpoint.checkpoints(run_dir)[-1:]
        took = kill(victim, agent, draw)
        victims[victim] += 1
        said: list[str] = []
        intact = checkpoint.latest(run_dir, said.append)
        assert not said, f"a finished checkpoint is damaged: {said}"
        lost = [c.name for c in seen if not c.exists()]
        after = 0 if intact is None else checkpoint.step_of(intact)
        # keep=3: of those that were there only older ones may have made room for newer ones
        assert after >= before and not (lost and after <= checkpoint.step_of(seen[-1])), f"lost {lost}"
        half = sorted(p.name for p in checkpoint.folder_of(run_dir).glob(PARTIAL))
        print(
            f"{number:3}  {victim:5}  {'while writing' if writing else 'at any moment'}  newest checkpoint {after:5}  "
            f"{'half-written: ' + ', '.join(half) if half else '':40}  gone after {took:.1f} s",
            flush=True,
        )
    agent = start(recipe, run_dir, steps, log)
    assert agent.wait() == 0, log.read_text()[-4000:]
    compare(whole, run_dir, steps)
    print(f"{kills} kills ({', '.join(f'{count} of {name}' for name, count in sorted(victims.items()))}): ", end="")
    print(f"after {steps} steps parameters, optimiser, generators and every loss are those of the uninterrupted run")


def compare(whole: Path, killed: Path, steps: int) -> None:
    """Weights, optimiser state and losses, bit for bit."""
    name = f"step_{steps:08d}"
    a, b = checkpoint.folder_of(whole) / name, checkpoint.folder_of(killed) / name
    files = sorted(path.relative_to(a) for path in a.rglob("*.pt"))
    assert files == sorted(path.relative_to(b) for path in b.rglob("*.pt")) and len(files) >= 5
    for file in files:
        assert_equal(torch.load(a / file, weights_only=False), torch.load(b / file, weights_only=False), str(file))
    losses = [
        [r["loss"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "train"] for run in (whole, killed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == -(-steps // 10), "the losses differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="keep everything here; a temporary folder otherwise")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="riverrun-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        soak(folder, options.kills, options.seed)


if __name__ == "__main__":
    sys.exit(main())
