"""Is this machine ready to train? Each check returns one line or a few: OK, warning or problem, with a fix."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

GB = 10**9
CLOCK_SECONDS = 1.0  # more is worth a warning


@dataclass(frozen=True)
class Finding:
    """One line of the report. A fix goes with every warning and problem.

    Attributes:
        value: what was measured, to be compared with other devices or nodes: seconds, or bytes a second.
        group: what else is comparable with it, such as devices of the same model.
    """

    name: str
    state: Literal["ok", "warning", "problem"]
    detail: str
    fix: str = ""
    value: float | None = None
    group: str = ""


Check = Callable[[Path], Iterator[Finding]]


def examine(folder: Path, checks: Sequence[Check] | None = None) -> Iterator[Finding]:
    """Run every check; `folder` is where runs will be written. A check that itself fails is reported as a problem.

    Args:
        checks: these only.

    Raises:
        ValueError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"--dir {folder} is not a folder: create it, or name the one that runs will be written to")
    for check in CHECKS if checks is None else checks:
        try:
            yield from check(folder)
        except Exception as error:  # the report must go on, and say what happened
            yield Finding(check.__name__, "problem", f"{type(error).__name__}: {error}", "see the message")


def versions(folder: Path) -> Iterator[Finding]:
    """Python and every dependency, against the versions that the package itself declares."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        declared = metadata.metadata("riverrun")
    except metadata.PackageNotFoundError:
        yield Finding("riverrun", "warning", "not installed, so its requirements are unknown", "pip install -e .")
        return
    python = sys.version.split()[0]
    supported = SpecifierSet(declared["Requires-Python"] or "")
    yield _version("python", python, supported.contains(python, prereleases=True), str(supported))
    for line in metadata.requires("riverrun") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "problem", "not installed", f"pip install '{requirement}'")
        else:
            fits = requirement.specifier.contains(version, prereleases=True)
            yield _version(requirement.name, version, fits, str(requirement.specifier))


def imports(folder: Path) -> Iterator[Finding]:
    """The heavy packages in a process of their own: a broken CUDA set-up shows as an import error."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch, deepspeed, transformers, datasets"], capture_output=True, text=True
    )
    if done.returncode == 0:
        yield Finding("imports", "ok", "torch, deepspeed, transformers and datasets load")
    else:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding("imports", "problem", last, "reinstall that package for this Python, torch and CUDA")


def gpus(folder: Path) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            memory = f"{device.name}, {free / GB:.1f} of {total / GB:.1f} GB free"
            if free < 0.9 * total:
                yield Finding(f"GPU {i}", "warning", memory, "another process uses it: nvidia-smi shows which")
            else:
                yield Finding(f"GPU {i}", "ok", memory)
            if device.major < 8:
                yield Finding(f"GPU {i}", "warning", "no bf16 arithmetic", "train with train.dtype=fp32")
    elif shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        fix = "install a torch build that the driver supports, and check CUDA_VISIBLE_DEVICES"
        yield Finding("GPU", "problem", f"there is one, but torch cannot use it: {build}", fix)
    else:
        yield Finding("GPU", "ok", "none: training runs on the CPU")


def triton(folder: Path) -> Iterator[Finding]:
    """On Hopper, Triton ≥ 3.4, < 3.7.1 miscompiles patterns of the gated delta rule's backward pass (fla issue 640).
    What comes out of any Triton, the assembler of CUDA before 13.3 does (`assembler_finding`)."""
    import torch

    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        yield Finding("triton on Hopper", "ok", "no Triton: the vectorised torch kernels are used")
        return
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    yield hopper_finding(version, capabilities)
    from triton.backends.nvidia.compiler import get_ptxas

    yield assembler_finding(get_ptxas(90).version, capabilities)


def hopper_finding(version: str, capabilities: list[tuple[int, int]]) -> Finding:
    """Whether a Triton version is safe on GPUs of these compute capabilities; none: they may be on other nodes."""
    from packaging.version import Version

    name = "triton on Hopper"
    if not Version("3.4") <= Version(version) < Version("3.7.1"):
        return Finding(name, "ok", f"{version} is not among the versions known to miscompile")
    if capabilities and all(major != 9 for major, _ in capabilities):
        return Finding(name, "ok", f"{version} miscompiles there, but there is no Hopper GPU")
    detail = f"{version} can compute wrong gradients of gated delta layers on H100, H200 and GH200"
    return Finding(name, "warning", detail, "pip install 'triton>=3.7.1', with the torch release that it belongs to")


def assembler_finding(version: str, capabilities: list[tuple[int, int]]) -> Finding:
    """Whether the ptxas that Triton calls for Hopper is that of CUDA 13.3 or newer. Older ones reuse registers that an
    asynchronous matrix product (wgmma) still reads (Triton's pull request 11781, after CUDA 13.3's release notes)."""
    from packaging.version import Version

    name = "ptxas for Hopper"
    if Version(version) >= Version("13.3"):
        return Finding(name, "ok", f"that of CUDA {version}")
    if capabilities and all(major != 9 for major, _ in capabilities):
        return Finding(name, "ok", f"that of CUDA {version} has an error there, but there is no Hopper GPU")
    detail = f"that of CUDA {version} can make wrong products and illegal memory accesses on H100, H200 and GH200"
    fix = "pip install 'nvidia-cuda-nvcc>=13.3' and set TRITON_PTXAS_PATH to its bin/ptxas, or use a Triton from 3.9 on"
    return Finding(name, "warning", detail, fix)


def compiler(folder: Path) -> Iterator[Finding]:
    import torch

    found = next(
        (path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None
    )
    if found:
        yield Finding("C compiler", "ok", found)
    else:
        state: Literal["problem", "warning"] = "problem" if torch.cuda.is_available() else "warning"
        yield Finding("C compiler", state, "none: Triton and torch.compile need one", "install gcc, or set CC")


def cores_and_memory(folder: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container or a SLURM job may use
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    yield Finding("CPU", "ok", f"{cores} cores")
    if memory < 4 * GB:
        yield Finding("memory", "warning", f"{memory / GB:.1f} GB", "small runs need about 4 GB: ask for more")
    else:
        yield Finding("memory", "ok", f"{memory / GB:.1f} GB")


def disk(folder: Path) -> Iterator[Finding]:
    """Free space, and the speed at which 64 MB reach the disk."""
    free = shutil.disk_usage(folder).free
    detail = f"{free / GB:.1f} GB free in {folder.resolve()}"
    if free < GB:
        yield Finding("disk space", "problem", detail, "free some, or write elsewhere (--dir checks another folder)")
        return
    if free < 50 * GB:
        yield Finding("disk space", "warning", detail, "a checkpoint of a 1B model takes about 16 GB: keep 50 GB free")
    else:
        yield Finding("disk space", "ok", detail)
    block = os.urandom(16 * 2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".riverrun-doctor-") as file:
            start = time.perf_counter()
            for _ in range(4):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = 4 * len(block) / (time.perf_counter() - start)
    except OSError as error:
        yield Finding("disk speed", "problem", f"cannot write: {error}", "check the permissions, or use another folder")
        return
    detail = f"{speed / 10**6:.0f} MB/s"
    if speed < 100 * 10**6:
        fix = "checkpoints will be slow: write runs to a faster disk"
        yield Finding("disk speed", "warning", detail, fix, value=speed)
    else:
        yield Finding("disk speed", "ok", detail, value=speed)


def clock(folder: Path) -> Iterator[Finding]:
    """This machine's clock against the one that stamps the files in `folder`: a file server's, if there is one."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".riverrun-doctor-") as file:
        before = time.time()
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        stamp, after = os.stat(file.name).st_mtime, time.time()
    # a file system's clock ticks coarsely: a stamp may be a little older than the write
    skew = min(0.0, after - stamp) or max(0.0, before - stamp - 0.02)
    if abs(skew) <= CLOCK_SECONDS:
        yield Finding("clock", "ok", f"within {abs(skew):.2f} s of the file system's", value=skew)
    else:
        detail = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the file system's"
        fix = "start time synchronisation (chronyd or ntpd): times in logs and of files mislead otherwise"
        yield Finding("clock", "warning", detail, fix, value=skew)


def matmul(folder: Path) -> Iterator[Finding]:
    """Products on every device: right ones, and as fast as on the others."""
    import torch

    from riverrun.launch.doctor_devices import SLOWER, judge_device, outliers

    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    found = [judge_device(device) for device in devices]
    yield from found
    groups: dict[str, dict[str, float]] = {}
    for finding in found:
        if finding.value is not None:
            groups.setdefault(finding.group, {})[finding.name] = finding.value
    for seconds in groups.values():
        slow, certain = outliers(seconds, SLOWER)
        for name, excess in slow.items():
            than = "the median" if certain else "others, and too few of those are left to say which is at fault"
            fix = "look at its temperature, clocks and power limit (nvidia-smi -q), and at what else runs there"
            yield Finding(f"speed of {name}", "warning", f"{excess:.0%} slower than {than}", fix)


def collectives(folder: Path) -> Iterator[Finding]:
    """An all-reduce over two local processes with gloo, and with NCCL where there are two GPUs."""
    import torch

    from riverrun.launch.all_reduce import all_reduce_sums

    backends = ["gloo"] if torch.distributed.is_gloo_available() else []
    if torch.cuda.device_count() >= 2 and torch.distributed.is_nccl_available():
        backends.append("nccl")
    if not backends:
        yield Finding("collectives", "problem", "torch has neither gloo nor NCCL", "install an official torch build")
    for backend in backends:
        name = f"all-reduce, {backend}"
        try:
            sums = all_reduce_sums(backend)
        except Exception as error:  # of a child process; its last line says what failed
            last = str(error).strip().splitlines()[-1]
            variable = "GLOO_SOCKET_IFNAME" if backend == "gloo" else "NCCL_SOCKET_IFNAME"
            yield Finding(name, "problem", last, f"set {variable} to a working network interface, such as lo")
        else:
            if sums == [3.0, 3.0]:
                yield Finding(name, "ok", "2 local ranks agree")
            else:
                yield Finding(name, "problem", f"1 + 2 gave {sums}", "update the driver and NCCL")


CHECKS: tuple[Check, ...] = (
    versions, imports, gpus, triton, compiler, cores_and_memory, disk, clock, matmul, collectives,
)  # fmt: skip


def _version(name: str, version: str, fits: bool, wanted: str) -> Finding:
    if fits:
        return Finding(name, "ok", version)
    return Finding(name, "problem", f"{version}, but {wanted} is needed", f"pip install '{name}{wanted}'")
