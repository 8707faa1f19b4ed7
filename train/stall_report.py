"""Which rank made a run stall: what every rank last did, and the sentence that follows. Imports nothing heavy."""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# the order in which the loop goes through them while the same number of steps is done
PHASES = ("start", "record", "evaluate", "save", "data", "forward", "step", "end")
NAMED = 8  # ranks in a message; the report lists all


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last wrote of itself.

    Attributes:
        step: optimiser steps that were done when the phase began.
        since, time: when the phase began and when this was written, in seconds since 1970 by the rank's own clock.
        beats: how many it has written. One that grows is a living rank's, whatever the clocks of hosts say.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    time: float
    beats: int

    @property
    def place(self) -> tuple[int, int]:
        """How far the rank is: of two, the smaller is behind."""
        return self.step, PHASES.index(self.phase)

    def where(self) -> str:
        return f"'{self.phase}' of step {self.step}"


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "heartbeats" / f"rank_{rank:05d}.json"


def write_heartbeat(run_dir: Path, beat: Heartbeat) -> None:
    """Replaces the rank's file; a reader sees the old one or the new one."""
    path = heartbeat_path(run_dir, beat.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(asdict(beat)) + "\n")


def replace_text(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".partial")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def read_heartbeats(run_dir: Path, world_size: int) -> dict[int, tuple[Heartbeat, float]]:
    """Of every rank that has one: its heartbeat, and when the file server says that it was written."""
    found = {}
    for rank in range(world_size):
        path = heartbeat_path(run_dir, rank)
        try:
            with path.open(encoding="utf-8") as file:
                beat, written = Heartbeat(**json.load(file)), os.fstat(file.fileno()).st_mtime
        except (OSError, ValueError, TypeError):
            continue
        if beat.phase in PHASES:
            found[rank] = beat, written
    return found


def dumped(folder: Path) -> list[int]:
    """Ranks whose stacks are in a stall's folder."""
    return [int(path.stem.removeprefix("rank_")) for path in folder.glob("rank_*.txt")]


def read_traces(folder: Path) -> dict[int, dict[str, Any]]:
    """What `collectives` found on each rank that has written all it has to."""
    found = {}
    for path in folder.glob("rank_*.json"):
        try:
            found[int(path.stem.removeprefix("rank_"))] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # then without
            continue
    return found


def silent_for(
    before: Mapping[int, tuple[Heartbeat, float]], after: Mapping[int, tuple[Heartbeat, float]], beat_seconds: float
) -> dict[int, float]:
    """Ranks without a new heartbeat between two readings whose last is three beats older than the newest, and by how
    many seconds. Neither alone would do: a slow file server delays one, and clocks of hosts may stamp the other."""
    newest = max((written for _, written in after.values()), default=0.0)
    ages = {rank: newest - written for rank, (_, written) in after.items()}
    return {
        rank: age
        for rank, age in ages.items()
        if age > 3 * beat_seconds and rank in before and before[rank][0].beats == after[rank][0].beats
    }


def accuse(
    beats: Mapping[int, Heartbeat],
    silent: Mapping[int, float],
    world_size: int,
    now: float,
    traces: Mapping[int, Mapping[str, Any]] | None = None,
    here: str = "",
) -> str:
    """Who holds up the others, in a sentence.

    Args:
        silent: ranks whose process does not run any more, and since how many seconds.
        now: seconds since 1970.
        traces: `collectives` of every rank that wrote them.
        here: this host, on which processes can be looked at.
    """
    absent = [rank for rank in range(world_size) if rank not in beats]
    if absent:
        return f"{ranks_named(absent)} never wrote a heartbeat: not started, or unable to write to the run folder"
    left = [rank for rank, beat in beats.items() if beat.phase == "end"]
    gone = [rank for rank in silent if rank not in left]
    if gone:
        beat, seconds = beats[gone[0]], max(silent[rank] for rank in gone)
        state = process_state(beat.pid) if beat.host == here else "gone or stopped, or its host is"
        return (
            f"{on_hosts(gone, beats)} wrote no heartbeat for {seconds:.0f} s, last in {beat.where()}: "
            f"the process is {state}"
        )
    if left and len(left) < world_size:
        rest = [rank for rank in beats if rank not in left]
        return f"{on_hosts(left, beats)} left the training while {ranks_named(rest)} went on"
    first = min(beat.place for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.place == first]
    slowest, seconds = beats[behind[0]], now - min(beats[rank].since for rank in behind)
    if len(behind) < world_size:
        ahead = [beat for beat in beats.values() if beat.place > first]
        return (
            f"{on_hosts(behind, beats)} {'is' if len(behind) == 1 else 'are'} behind, in {slowest.where()} for "
            f"{seconds:.0f} s, while {_others(len(ahead))} in {min(ahead, key=lambda beat: beat.place).where()}"
        )
    if late := latecomers(traces or {}):
        name, ranks, what = late
        return (
            f"{on_hosts(ranks, beats)} did not join {what} of process group {name}, in {slowest.where()} for "
            f"{seconds:.0f} s"
        )
    if world_size == 1:
        return f"{on_hosts(behind, beats)} hangs in {slowest.where()} for {seconds:.0f} s"
    return (
        f"all {world_size} ranks hang in {slowest.where()} for {seconds:.0f} s, so that none is behind: the same call, "
        "or the network between them, holds them all"
    )


def collectives(trace: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The last collective that a rank began in each process group: its number there, and what it is.

    Args:
        trace: a dump of torch's flight recorder.
    """
    last: dict[str, tuple[int, str]] = {}
    for entry in trace.get("entries", ()):
        name = " ".join(str(part) for part in entry["process_group"])
        number = entry["collective_seq_id"]
        if not entry.get("is_p2p") and number > last.get(name, (-1, ""))[0]:
            frame = next((f for f in entry.get("frames", ()) if "torch/distributed" not in f["filename"]), None)
            caller = f" from {Path(frame['filename']).name}:{frame['line']}" if frame else ""
            last[name] = number, f"{entry['profiling_name']} {number}{caller}"
    return last


def latecomers(traces: Mapping[int, Mapping[str, Any]]) -> tuple[str, list[int], str] | None:
    """The process group in which some ranks began fewer collectives than others; who they are; which one they miss."""
    for name in sorted({name for trace in traces.values() for name in trace}):
        numbers = {rank: trace[name][0] for rank, trace in traces.items() if name in trace}
        low, high = min(numbers.values()), max(numbers.values())
        if low < high:
            leader = next(rank for rank, number in numbers.items() if number == high)
            late = sorted(rank for rank, number in numbers.items() if number == low)
            return name, late, str(traces[leader][name][1])
    return None


def table(
    beats: Mapping[int, Heartbeat], silent: Mapping[int, float], stacks: Collection[int], now: float
) -> list[str]:
    """A line a rank."""
    rows = [f"{'rank':>5}  {'host':<20} {'pid':>8} {'step':>8}  {'phase':<9} {'seconds in it':>13}  notes"]
    for rank, beat in sorted(beats.items()):
        notes = [f"no heartbeat for {silent[rank]:.0f} s"] if rank in silent else []
        notes += [] if rank in stacks else ["no stacks"]
        rows.append(
            f"{rank:>5}  {beat.host:<20} {beat.pid:>8} {beat.step:>8}  {beat.phase:<9} {now - beat.since:>13.1f}  "
            f"{', '.join(notes)}".rstrip()
        )
    return rows


def ranks_named(ranks: Iterable[int]) -> str:
    """rank 3; ranks 0, 2-5, 9"""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    single = len(spans) == 1 and spans[0][0] == spans[0][1]
    return f"rank {texts[0]}" if single else f"ranks {', '.join(texts)}"


def on_hosts(ranks: Iterable[int], beats: Mapping[int, Heartbeat]) -> str:
    """rank 3 on host a; ranks 4, 5 on host b"""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(beats[rank].host, []).append(rank)
    texts = [f"{ranks_named(some)} on {host}" for host, some in by_host.items()]
    more = f" and {len(texts) - NAMED} more hosts" if len(texts) > NAMED else ""
    return ", ".join(texts[:NAMED]) + more


def process_state(pid: int) -> str:
    """Of a process of this host, whose heart does not beat."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    states = {
        "T": "stopped by a signal",
        "t": "stopped by a debugger",
        "Z": "gone",
        "D": "waiting for a device or disk",
    }
    return states.get(state, "alive, but its interpreter does not run: a call holds its lock")


def _others(count: int) -> str:
    return "the other is" if count == 1 else f"the {count} others are"
