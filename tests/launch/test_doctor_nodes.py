"""Nodes compared: which is bad for certain, what is only worth a look, what is nobody's fault. All without nodes."""

import pytest

from riverrun.launch.doctor import Finding
from riverrun.launch.doctor_devices import outliers
from riverrun.launch.doctor_nodes import NodeReport, Verdict, judge, judge_errors, table

H200 = "NVIDIA H200"


def node(name, *times, group=H200, disk=1e9, clock=0.0, facts=None, extra=()):
    """A node in order, with a GPU for each time of a product."""
    findings = [
        *(Finding(f"matmul on cuda:{i}", "ok", "", value=seconds, group=group) for i, seconds in enumerate(times)),
        Finding("disk speed", "ok", "", value=disk),
        Finding("clock", "ok", "", value=clock),
        *extra,
    ]
    return NodeReport(name, findings, {"torch": "2.13"} | (facts or {}))


def clean(verdict):
    return (verdict.bad, verdict.problems, verdict.warnings) == ({}, [], [])


@pytest.mark.parametrize(
    ("seconds", "slow", "certain"),
    [
        ({}, [], True),
        ({"a": 1.0}, [], True),
        ({"a": 1.0, "b": 1.14}, [], True),
        ({"a": 1.0, "b": 1.2}, ["b"], False),  # which of two is usual?
        ({"a": 1.0, "b": 1.2, "c": 1.0}, ["b"], True),
        ({"a": 1.0, "b": 1.16, "c": 1.02, "d": 1.03}, [], True),  # the median is 1.02
        ({"a": 1.0, "b": 1.2, "c": 1.2}, [], True),  # the fast one is the odd one
        ({"a": 1.0, "b": 1.2, "c": 1.2, "d": 1.0}, ["b", "c"], False),
        ({str(i): 1.0 + 0.3 * (i > 5) for i in range(8)}, ["6", "7"], True),
    ],
)
def test_outliers(seconds, slow, certain):
    found, sure = outliers(seconds, 0.15)
    assert list(found) == slow and sure == certain
    assert all(excess == pytest.approx(seconds[key] / 1.0 - 1, abs=0.03) for key, excess in found.items())


def test_equal_nodes_are_fine():
    assert clean(judge([node("a", 1e-3, 1.05e-3), node("b", 1e-3, 0.97e-3), node("c", 1e-3, 1e-3)]))


def test_a_slow_gpu_makes_its_node_bad():
    verdict = judge([node("a", 1e-3, 1e-3), node("b", 1e-3, 1.3e-3)])
    assert verdict.bad == {"b": ["matmul on cuda:1 takes 1.30 ms, 30% more than the median of 4"]}


def test_of_two_nodes_none_is_bad_for_its_speed_alone():
    verdict = judge([node("a", 1e-3, 1e-3), node("b", 1.3e-3, 1.3e-3)])
    assert not verdict.bad and not verdict.problems
    assert len(verdict.warnings) == 2 and all("too few to say which are at fault" in w for w in verdict.warnings)
    assert clean(judge([node("a", 1e-3)]))


def test_gpus_of_different_models_are_not_compared():
    verdict = judge([node(n, 1e-3) for n in "abc"] + [node(n, 3e-3, group="NVIDIA A100") for n in "de"])
    assert clean(verdict)


def test_processors_that_others_use_too_are_only_mentioned():
    verdict = judge([node(n, 1e-3, group="cpu") for n in "abc"] + [node("d", 1.8e-3, group="cpu")])
    assert clean(verdict)
    verdict = judge([node(n, 1e-3, group="cpu") for n in "abc"] + [node("d", 3e-3, group="cpu")])
    assert not verdict.bad and "d: matmul on cuda:0 takes 3.00 ms, 200% more than others" in verdict.warnings


WRONG = Finding("matmul on cuda:1", "problem", "relative error 1", "take it out of service", 1e-3, H200)
OLD = Finding("deepspeed", "problem", "0.1, but >=0.19.8 is needed", "pip install deepspeed")


def test_a_failure_on_some_nodes_is_theirs():
    verdict = judge([node("a", 1e-3), node("b", 1e-3, extra=[WRONG]), node("c", 1e-3, extra=[OLD])])
    assert verdict.bad == {
        "b": ["matmul on cuda:1: relative error 1"],
        "c": ["deepspeed: 0.1, but >=0.19.8 is needed"],
    }
    assert not verdict.problems


def test_a_failure_on_all_nodes_is_nobodys():
    verdict = judge([node(n, 1e-3, extra=[OLD]) for n in "abc"])
    assert not verdict.bad
    assert verdict.problems == ["deepspeed on all 3 nodes: 0.1, but >=0.19.8 is needed; fix: pip install deepspeed"]


def test_a_single_node_is_bad_only_for_its_hardware():
    assert judge([node("a", extra=[WRONG])]).bad == {"a": ["matmul on cuda:1: relative error 1"]}
    verdict = judge([node("a", extra=[OLD])])
    assert not verdict.bad and verdict.problems[0].startswith("deepspeed on a: 0.1")


def test_a_node_that_does_not_report():
    assert judge([node("a", 1e-3)], ["b", "c"], 60).bad == {
        "b": ["no report within 60 s"],
        "c": ["no report within 60 s"],
    }


@pytest.mark.parametrize(
    ("clocks", "bad", "warned"),
    [
        ([0.0, 0.5, -0.4], [], []),
        ([0.0, 3.0, 0.1], [], ["b"]),
        ([0.0, 90.0, 0.1], ["b"], []),
        ([500.0, 500.2, 499.9], [], []),  # the file server is the one that is off, or all of them
        ([0.0, 90.0], [], ["b"]),  # either
        ([0.0, 90.0, 90.0, 0.0], [], ["b", "c"]),
    ],
)
def test_clocks(clocks, bad, warned):
    names = "abcd"
    verdict = judge([node(name, clock=clock) for name, clock in zip(names, clocks)])
    assert list(verdict.bad) == bad
    assert [text[0] for text in verdict.warnings] == warned
    assert all(
        "ahead of the others'" in text
        for text in [*verdict.warnings, *(reason for reasons in verdict.bad.values() for reason in reasons)]
    )


def test_a_slow_disk_is_worth_a_look():
    verdict = judge([node("a"), node("b", disk=0.4e9), node("c", disk=0.09e9)])
    assert not verdict.bad and verdict.warnings == ["c writes 90 MB/s, others 400 MB/s"]


def test_versions_that_differ():
    nodes = [node(name) for name in "abc"]
    verdict = judge([*nodes, node("d", facts={"torch": "2.12"})])
    assert verdict.bad == {"d": ["torch is 2.12, on the others 2.13"]}
    verdict = judge([*nodes, node("d", facts={"triton": "3.9"})])
    assert verdict.bad == {"d": ["triton is 3.9, on the others missing"]}
    verdict = judge([nodes[0], node("d", facts={"torch": "2.12"})])  # either
    assert not verdict.bad and "torch differs between the nodes: 2.13 on a, 2.12 on d" in verdict.problems[0]


def test_warnings_of_many_nodes_are_one():
    slow = Finding("disk space", "warning", "10 GB free", "keep 50 GB free")
    verdict = judge([node(name, extra=[slow]) for name in "abc"])
    assert verdict.warnings == ["disk space, a: 10 GB free (and 2 more nodes); fix: keep 50 GB free"]


@pytest.mark.parametrize(
    ("errors", "bad", "problems"),
    [
        ({"a": "", "b": "", "c": "refused"}, {"c": ["meeting: refused"]}, []),
        ({"a": "", "b": "refused"}, {}, ["meeting failed on 1 of 2 nodes; b: refused"]),
        ({"a": "", "b": "x", "c": "y"}, {}, ["meeting failed on 2 of 3 nodes; b: x"]),
        ({"a": "", "b": ""}, {}, []),
    ],
)
def test_what_goes_wrong_together(errors, bad, problems):
    verdict = Verdict()
    judge_errors(errors, "meeting", verdict)
    assert verdict.bad == bad and verdict.problems == problems


def test_the_table_has_all_nodes():
    reports = [node("a", 1e-3, 2e-3, facts={"devices": "2 x H200"}), node("bb", clock=1.5, facts={"devices": "cpu"})]
    verdict = Verdict()
    verdict.blame("bb", "x")
    verdict.blame("c", "y")
    assert [line.split() for line in table(reports, verdict)] == [
        ["node", "devices", "matmul", "ms", "disk", "MB/s", "clock", "s", "verdict"],
        ["a", "2", "x", "H200", "1.00-2.00", "1000", "+0.00", "ok"],
        ["bb", "cpu", "-", "1000", "+1.50", "BAD"],
        ["c", "-", "-", "-", "-", "BAD"],
    ]
