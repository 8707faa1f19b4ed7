"""What the nodes of a SLURM job found out about themselves, compared: which of them must not be used.

A node is bad if it did not report, if a check failed there and not on all nodes, or if it is an outlier among enough
nodes to tell. What fails on all nodes is nobody's fault: a wrong installation, which no other nodes would mend.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from riverrun.launch.doctor import Finding
from riverrun.launch.doctor_devices import SLOWER, outliers

CLOCKS_APART = 1.0  # seconds from the others' median: worth a warning
CLOCK_WRONG = 30.0  # and that much makes a node bad
DISK_SLOWER = 3.0  # a shared disk's speed varies: a quarter of the usual is worth a warning
HARDWARE = ("matmul", "GPU count")  # what no installation gets wrong
CPU_SLOWER = 1.0  # so does that of processors which others use too


@dataclass(frozen=True)
class NodeReport:
    """Of one node.

    Attributes:
        facts: what has to be the same on all of them, such as versions.
    """

    node: str
    findings: list[Finding]
    facts: dict[str, str]


@dataclass
class Verdict:
    """Attributes:
    bad: nodes that must not be used, and why.
    problems: what is wrong on all nodes alike.
    warnings: what to look at.
    """

    bad: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def blame(self, node: str, reason: str) -> None:
        self.bad.setdefault(node, []).append(reason)


def judge(reports: Sequence[NodeReport], missing: Sequence[str] = (), waited: float = 0.0) -> Verdict:
    """Compares nodes.

    Args:
        missing: nodes without a report after `waited` seconds.
    """
    verdict = Verdict()
    for node in missing:
        verdict.blame(node, f"no report within {waited:.0f} s")
    _failures(reports, verdict)
    _speeds(reports, verdict)
    _disks(reports, verdict)
    _clocks(reports, verdict)
    _facts(reports, verdict)
    return verdict


def judge_errors(errors: Mapping[str, str], what: str, verdict: Verdict) -> None:
    """Of a joint effort, what each node says went wrong ("": nothing). The ones it went wrong for are bad if most
    others are well; else it cannot be told which of them, or the network, is."""
    failed = {node: error for node, error in errors.items() if error}
    if failed and 2 * len(failed) < len(errors):
        for node, error in failed.items():
            verdict.blame(node, f"{what}: {error}")
    elif failed:
        node, error = next(iter(failed.items()))
        verdict.problems.append(f"{what} failed on {len(failed)} of {len(errors)} nodes; {node}: {error}")


def _failures(reports: Sequence[NodeReport], verdict: Verdict) -> None:
    """Checks that failed: nobody has to be compared with to know that a wrong product is wrong."""
    problems: dict[str, dict[str, Finding]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.state == "problem":
                problems.setdefault(finding.name, {})[report.node] = finding
    for name, found in problems.items():
        alone = len(reports) == 1 and name.startswith(HARDWARE)
        if len(found) == len(reports) and not alone:
            node, finding = next(iter(found.items()))
            where = f"on all {len(reports)} nodes" if len(reports) > 1 else f"on {node}"
            verdict.problems.append(f"{name} {where}: {finding.detail}; fix: {finding.fix}")
        else:
            for node, finding in found.items():
                verdict.blame(node, f"{name}: {finding.detail}")
    said: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.state == "warning":
                said.setdefault((finding.name, finding.fix), []).append(f"{report.node}: {finding.detail}")
    for (name, fix), texts in said.items():
        more = f" (and {len(texts) - 1} more nodes)" if len(texts) > 1 else ""
        verdict.warnings.append(f"{name}, {texts[0]}{more}; fix: {fix}")


def _speeds(reports: Sequence[NodeReport], verdict: Verdict) -> None:
    groups: dict[str, dict[tuple[str, str], float]] = {}
    for report in reports:
        for finding in report.findings:
            if finding.name.startswith("matmul") and finding.value is not None:
                groups.setdefault(finding.group, {})[report.node, finding.name] = finding.value
    for group, seconds in groups.items():
        cpu = group == "cpu"
        slow, certain = outliers(seconds, CPU_SLOWER if cpu else SLOWER)
        for (node, name), excess in slow.items():
            text = f"{name} takes {1e3 * seconds[node, name]:.2f} ms, {excess:.0%} more than"
            if certain and not cpu:
                verdict.blame(node, f"{text} the median of {len(seconds)}")
            else:
                rest = "others" if certain else "others, of which there are too few to say which are at fault"
                verdict.warnings.append(f"{node}: {text} {rest}")


def _disks(reports: Sequence[NodeReport], verdict: Verdict) -> None:
    speeds = _values(reports, "disk speed")
    slow, _ = outliers({node: 1 / max(speed, 1.0) for node, speed in speeds.items()}, DISK_SLOWER)
    for node in slow:
        usual = statistics.median_high(speeds.values())
        verdict.warnings.append(f"{node} writes {speeds[node] / 1e6:.0f} MB/s, others {usual / 1e6:.0f} MB/s")


def _clocks(reports: Sequence[NodeReport], verdict: Verdict) -> None:
    skews = _values(reports, "clock")
    usual = statistics.median_low(skews.values()) if skews else 0.0
    off = {node: skew - usual for node, skew in skews.items() if abs(skew - usual) > CLOCKS_APART}
    certain = len(skews) >= 3 and 2 * len(off) < len(skews)
    for node, seconds in off.items():
        text = f"its clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} the others'"
        if certain and abs(seconds) > CLOCK_WRONG:
            verdict.blame(node, text)
        else:
            verdict.warnings.append(f"{node}: {text}; start time synchronisation (chronyd or ntpd)")


def _facts(reports: Sequence[NodeReport], verdict: Verdict) -> None:
    """Nodes that differ from the majority are bad; without one, training would break on the difference all the same."""
    for fact in dict.fromkeys(name for report in reports for name in report.facts):
        values = {report.node: report.facts.get(fact, "missing") for report in reports}
        [(common, count), *others] = Counter(values.values()).most_common()
        if not others:
            continue
        if len(values) >= 3 and 2 * count > len(values):
            for node, value in values.items():
                if value != common:
                    verdict.blame(node, f"{fact} is {value}, on the others {common}")
        else:
            different = ", ".join(f"{value} on {node}" for node, value in list(values.items())[:4])
            verdict.problems.append(f"{fact} differs between the nodes: {different}; fix: install the same everywhere")


def _values(reports: Sequence[NodeReport], name: str) -> dict[str, float]:
    return {
        report.node: finding.value
        for report in reports
        for finding in report.findings
        if finding.name == name and finding.value is not None
    }


def table(reports: Sequence[NodeReport], verdict: Verdict) -> list[str]:
    """A line a node: what was measured there."""
    rows = [("node", "devices", "matmul ms", "disk MB/s", "clock s", "verdict")]
    disks, clocks = _values(reports, "disk speed"), _values(reports, "clock")
    for report in reports:
        times = [1e3 * f.value for f in report.findings if f.name.startswith("matmul") and f.value is not None]
        span = f"{min(times):.2f}-{max(times):.2f}" if len(times) > 1 else f"{times[0]:.2f}" if times else "-"
        rows.append(
            (
                report.node,
                report.facts.get("devices", "-"),
                span,
                f"{disks[report.node] / 1e6:.0f}" if report.node in disks else "-",
                f"{clocks[report.node]:+.2f}" if report.node in clocks else "-",
                "BAD" if report.node in verdict.bad else "ok",
            )
        )
    rows += [(node, "-", "-", "-", "-", "BAD") for node in verdict.bad if node not in {r.node for r in reports}]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
