"""A private SLURM cluster on this host: munged, slurmctld and one slurmd a node, without systemd or root."""

import contextlib
import ctypes
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

GIVE_UP = 600.0  # seconds; a defect ends a wait, never a slow machine
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
NEEDED = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "scontrol": "slurm-client",
    "srun": "slurm-client",
}
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")

CONFIG = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here, with the packages that it takes; "" if there can."""
    packages = {package for program, package in NEEDED.items() if shutil.which(program, path=PATH) is None}
    return f"needs a SLURM: apt-get install {' '.join(sorted(packages))}" if packages else ""


def wait_until(condition: Callable[[], object], what: str, seconds: float = GIVE_UP) -> None:
    """Polls; the limit is there to end a test whose condition never comes true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"gave up waiting for {what}")
        time.sleep(0.1)


class Cluster:
    """`nodes` nodes n1, n2, …, each of which runs one job at a time."""

    def __init__(self, root: Path, nodes: int):
        self.root, self.daemons = root, {}
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": PATH}

    def __enter__(self) -> "Cluster":
        for name in ("state", "log", "munge", *(f"spool/{node}" for node in self.nodes)):
            (self.root / name).mkdir(parents=True)
        (self.root / "munge").chmod(0o755)
        key = self.root / "munge" / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        # slurmd prepares a cgroup plugin even if nothing uses it, which fails in many containers
        modern = _version(self.env) >= (23, 11)
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={'disabled' if modern else 'cgroup/v1'}\n")
        try:
            self._start_munge(key)
            for _ in range(5):
                if self._start_daemons():
                    return self
            raise RuntimeError(f"the daemons do not stay up:\n{self.logs()}")
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._stop_daemons()
        self._end("munged")
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def command(self, *arguments: object) -> str:
        """What one of SLURM's programs prints."""
        words = [str(a) for a in arguments]
        done = subprocess.run(words, env=self.env, text=True, capture_output=True)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", "-o", job)))

    def wait_for_end(self, job: str) -> dict[str, str]:
        wait_until(lambda: self.job(job)["JobState"] in ENDED, f"the end of job {job}")
        return self.job(job)

    def tasks(self, *words: str) -> list[int]:
        """The processes of jobs whose command line holds all of `words`."""
        return [pid for pid in self._processes() if all(word in read(pid, "cmdline") for word in words)]

    def cut_power(self, node: str) -> None:
        """The daemon, then what watches over tasks, then the tasks are killed: in that order nobody reports them."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        log = str(self.root / "log" / f"slurmd-{node}.log")
        watchers = [pid for pid in _pids() if "slurmstepd: [" in read(pid, "cmdline") and log in _open_files(pid)]
        tasks = [pid for pid in self._processes() if f"SLURMD_NODENAME={node}\0" in read(pid, "environ")]
        assert watchers and tasks
        for pid in watchers + tasks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def restore_power(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", self.root / "slurm.conf")
        wait_until(lambda: self._idle() == len(self.nodes), f"node {node}")

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        files = sorted((self.root / "log").iterdir())
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def _start_munge(self, key: Path) -> None:
        folder = self.root / "munge"
        self._spawn(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'munge.sock'}",
            f"--pid-file={folder / 'pid'}", f"--seed-file={folder / 'seed'}",
            f"--log-file={self.root / 'log' / 'munged.log'}",
        )  # fmt: skip
        wait_until((folder / "munge.sock").exists, "munge's socket", 60)

    def _start_daemons(self) -> bool:
        """False if one of them ended, as it does when somebody else was given its port meanwhile."""
        ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000 State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:])
        )
        (self.root / "slurm.conf").write_text(
            CONFIG.format(host=socket.gethostname(), port=ports[0], user=getpass.getuser(), root=self.root, nodes=nodes)
        )
        config = self.root / "slurm.conf"
        self._spawn("slurmctld", "slurmctld", "-D", "-c", "-i", "-f", config)
        for node in self.nodes:
            self._spawn(node, "slurmd", "-D", "-N", node, "-f", config)
        dead: list[str] = []

        def settled() -> bool:
            dead.extend(name for name, process in self.daemons.items() if process.poll() is not None)
            return bool(dead) or self._idle() == len(self.nodes)

        wait_until(settled, "idle nodes", 60)
        if dead:
            self._stop_daemons()
        return not dead

    def _idle(self) -> int:
        done = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=self.env, text=True, capture_output=True)
        return done.stdout.split().count("idle")

    def _spawn(self, name: str, *arguments: object) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                [str(a) for a in arguments], env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=_end_with_parent,
            )  # fmt: skip

    def _stop_daemons(self) -> None:
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            cancel = ["scancel", "--full", "--signal=KILL", "-u", getpass.getuser()]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(cancel, env=self.env, capture_output=True, timeout=10)
        for name in (*self.nodes, "slurmctld"):
            self._end(name)

    def _end(self, name: str) -> None:
        process = self.daemons.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _processes(self) -> list[int]:
        """Whatever runs with this cluster's configuration: torchrun's workers, sessions of their own, outlive jobs."""
        mark = f"SLURM_CONF={self.root}/slurm.conf\0"
        daemons = {process.pid for process in self.daemons.values()}
        return [pid for pid in _pids() if pid not in daemons and mark in read(pid, "environ")]


def _free_ports(number: int) -> list[int]:
    """Below those that the system gives away on its own, so that they are still free a moment later."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        while len(ports) < number:
            port = random.randint(10000, 19999)
            try:
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
        return ports


def _version(env: dict[str, str]) -> tuple[int, int]:
    text = subprocess.run(["slurmctld", "-V"], env=env, text=True, capture_output=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())


def read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _open_files(pid: int) -> list[str]:
    try:
        return [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no daemon outlives the tests
