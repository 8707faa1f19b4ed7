"""Which rank a stall is blamed on, from heartbeats and the flight recorder's record."""

import json
import os
import signal
import subprocess
import sys

import pytest

from riverrun.train.stall_report import (
    Heartbeat,
    accuse,
    collectives,
    latecomers,
    ranks_named,
    read_heartbeats,
    silent_for,
    write_heartbeat,
)


def beats(*places: tuple[int, str], host="n") -> dict[int, Heartbeat]:
    return {
        rank: Heartbeat(rank, f"{host}{rank // 2}", 10 + rank, step, phase, 100.0, 200.0, 5)
        for rank, (step, phase) in enumerate(places)
    }


@pytest.mark.parametrize(
    ("places", "silent", "said"),
    [
        ([(4, "data")], {}, "rank 0 on n0 hangs in 'data' of step 4 for 110 s"),
        (
            [(4, "step"), (4, "forward")],
            {},
            "rank 1 on n0 is behind, in 'forward' of step 4 for 110 s, while the other is in 'step' of step 4",
        ),
        # the step counts those done: an evaluation after step 4 comes before the data of the next
        ([(4, "data"), (4, "save"), (4, "data")], {}, "rank 1 on n0 is behind, in 'save' of step 4"),
        ([(4, "step"), (5, "evaluate"), (5, "data")], {}, "while the 2 others are in 'evaluate' of step 5"),
        ([(4, "step"), (4, "data"), (4, "data"), (4, "data")], {}, "rank 1 on n0, ranks 2-3 on n1 are behind"),
        ([(4, "step")] * 2, {}, "all 2 ranks hang in 'step' of step 4 for 110 s, so that none is behind"),
        # it may have been ahead; it does not run
        ([(4, "step"), (4, "forward")], {0: 63.0}, "rank 0 on n0 wrote no heartbeat for 63 s, last in 'step'"),
        ([(4, "step"), (4, "end")], {1: 63.0}, "rank 1 on n0 left the training while rank 0 went on"),
    ],
)
def test_the_rank_to_blame(places, silent, said):
    assert said in accuse(beats(*places), silent, len(places), now=210.0)


def test_a_rank_that_never_came():
    assert accuse(beats((0, "data")), {}, 4, now=210.0).startswith("ranks 1-3 never wrote a heartbeat")


def test_a_process_of_this_host_is_looked_at():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = {0: Heartbeat(0, "n0", process.pid, 3, "data", 1.0, 2.0, 1)}
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert accuse(found, {0: 9.0}, 1, now=3.0, here="n0").endswith("the process is stopped by a signal")
        assert accuse(found, {0: 9.0}, 1, now=3.0, here="n1").endswith("gone or stopped, or its host is")
    finally:
        process.kill()
        process.communicate()
    assert accuse(found, {0: 9.0}, 1, now=3.0, here="n0").endswith("the process is gone")


def test_silence_needs_both_an_old_file_and_no_new_beat():
    def reading(*pairs):
        return {r: (Heartbeat(r, "n", 1, 1, "data", 0.0, 0.0, count), written) for r, (count, written) in
                enumerate(pairs)}  # fmt: skip

    before = reading((5, 100.0), (5, 100.0), (5, 60.0), (5, 60.0))
    after = reading((6, 105.0), (5, 100.0), (6, 60.0), (5, 60.0))
    # 1: its next beat is merely not due; 2: stamped by a clock that is behind, but beating
    assert silent_for(before, after, 5.0) == {3: 45.0}


def test_the_flight_recorder_names_who_did_not_join():
    def entry(group, number, name="nccl:all_reduce", **more):
        frames = [
            {"filename": "/x/torch/distributed/distributed_c10d.py", "line": 1, "name": "all_reduce"},
            {"filename": "/x/train/engine.py", "line": 77, "name": "step"},
        ]
        return {"process_group": group, "collective_seq_id": number, "profiling_name": name, "frames": frames} | more

    early = collectives({"entries": [entry(("0", "dp"), 8), entry(("1", "tp"), 30)]})
    late = collectives(
        {"entries": [entry(("0", "dp"), 7), entry(("1", "tp"), 30), entry(("1", "tp"), 99, is_p2p=True)]}
    )
    assert early == {
        "0 dp": (8, "nccl:all_reduce 8 from engine.py:77"),
        "1 tp": (30, "nccl:all_reduce 30 from engine.py:77"),
    }
    assert latecomers({0: early, 1: late, 2: early}) == ("0 dp", [1], "nccl:all_reduce 8 from engine.py:77")
    assert latecomers({0: early, 1: early}) is None and latecomers({}) is None
    said = accuse(beats(*[(4, "step")] * 3), {}, 3, now=210.0, traces={0: early, 1: late, 2: early})
    assert said.startswith("rank 1 on n0 did not join nccl:all_reduce 8 from engine.py:77 of process group 0 dp")


def test_ranks_in_words():
    assert ranks_named([3]) == "rank 3"
    assert ranks_named([2, 0, 3, 4, 9]) == "ranks 0, 2-4, 9"


def test_a_heartbeat_survives_its_file(tmp_path):
    beat = beats((4, "data"))[0]
    write_heartbeat(tmp_path, beat)
    assert read_heartbeats(tmp_path, 3).keys() == {0} and read_heartbeats(tmp_path, 3)[0][0] == beat
    path = tmp_path / "heartbeats" / "rank_00001.json"
    for text in ("", "{}", json.dumps({"rank": 1})):
        path.write_text(text)
        assert read_heartbeats(tmp_path, 3).keys() == {0}
