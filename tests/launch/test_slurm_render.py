"""The batch script: what users give cannot become a command; the shell library decides as it should."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import riverrun
from riverrun.launch import slurm
from riverrun.train import outcome
from tests.launch.slurm_runs import calls, checkpoints, said

HOSTILE = [
    "; rm -rf stolen",
    "$(touch stolen)",
    "`touch stolen`",
    "x\ntouch stolen\n#SBATCH --nodes=99",
    "it's \"quoted\" \\'twice\\'",
    "--run-dir=elsewhere",
    "-x",
    "",
    "*",
    "~",
    "naïve 数 \u202e",
    "a && touch stolen | b > stolen",
    "$HOME ${PATH} !!",
    "'; touch stolen; '",
]
NEEDS_SHELLCHECK = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs apt-get install shellcheck")


def job(tmp_path, **values):
    base = {"recipe": "quickstart", "overrides": (), "run_dir": tmp_path / "run", "work_dir": tmp_path}
    return slurm.Job(**{**base, "gpus_per_node": 0, "nproc": 1, **values})


def run_script(bin, run_dir: Path, script: Path, srun: str = "", **env) -> subprocess.CompletedProcess:
    """The script as SLURM would run it, on a node of its own."""
    bin("scontrol", '[ "$1 $2" = "show hostnames" ] && echo node1\n[ "$2" = node ] && echo "x NodeAddr=10.1.2.3 y"\n:')
    bin("srun", srun)
    base = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1"}
    return subprocess.run(
        ["bash", script], env={**os.environ, **base, **env}, text=True, capture_output=True, cwd=run_dir.parent
    )


# rendering


def test_every_value_arrives_as_it_was_given_and_nothing_is_run(tmp_path, bin):
    run_dir = tmp_path / "a 'run' $(touch stolen)`touch stolen`; \"touch stolen\" 100%"
    script = slurm.write(job(tmp_path, recipe=HOSTILE[0], overrides=tuple(HOSTILE), run_dir=run_dir, check=False))
    done = run_script(bin, tmp_path, script, srun="exit 3")
    (call,) = calls(tmp_path / "bin" / "srun.calls")
    assert call[call.index("bash") :] == [
        "bash", f"{run_dir}/slurm/node.sh", f"--run-dir={run_dir}", "--resume=auto", "--", HOSTILE[0], *HOSTILE,
    ]  # fmt: skip
    assert done.returncode == 3 and not list(tmp_path.rglob("stolen")), done


def test_a_directive_holds_one_line_whatever_is_given(tmp_path):
    for value in HOSTILE:
        if value and value.isprintable():
            lines = slurm.directives(job(tmp_path, account=value))
            (line,) = [line for line in lines if "--account" in line]
            assert len(line.splitlines()) == 1 and (line.endswith('"') or re.fullmatch(r"#SBATCH --account=\S+", line))
        elif value:
            with pytest.raises(ValueError, match="cannot be printed"):
                slurm.directives(job(tmp_path, account=value))
    with pytest.raises(ValueError, match="cannot be printed"):
        slurm.render(job(tmp_path, run_dir=tmp_path / "a\n#SBATCH --nodes=99"))
    assert slurm.directives(job(tmp_path, constraint='a"b\\c'))[-7:][0] == '#SBATCH --constraint="a\\"b\\\\c"'


def test_directives_end_before_the_first_command(tmp_path):
    """SLURM reads them up to there: a value with a newline cannot add one."""
    lines = slurm.render(job(tmp_path, overrides=("x\n#SBATCH --nodes=99",))).splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert "#SBATCH --nodes=99'" in lines[first:] and sum("--nodes" in line for line in lines[:first]) == 1


def test_sizes_come_from_the_command_line_alone(tmp_path):
    lines = slurm.directives(job(tmp_path, nodes=7, gpus_per_node=5, nproc=None, exclusive=False))
    assert {"#SBATCH --nodes=7", "#SBATCH --gpus-per-node=5", "#SBATCH --ntasks-per-node=1"} <= set(lines)
    assert "nproc=''" in slurm.settings(job(tmp_path, gpus_per_node=5, nproc=None))
    assert not [line for line in slurm.directives(job(tmp_path)) if "gpu" in line or "mem" in line or "time" in line]
    for option in ("partition", "account", "qos", "constraint", "exclude", "mem"):
        assert f"#SBATCH --{option}=it" in slurm.directives(job(tmp_path, **{option: "it"}))
    lines = slurm.directives(job(tmp_path, time="2-00:00:00", signal_seconds=77))
    assert {"#SBATCH --time=2-00:00:00", "#SBATCH --signal=B:USR1@77", "#SBATCH --requeue"} <= set(lines)
    assert '#SBATCH --output="/runs/50%% off/slurm/%j.out"' in slurm.directives(
        job(tmp_path, run_dir=Path("/runs/50% off"))
    )
    lines = slurm.directives(job(tmp_path, chain=4, array=True))
    assert {"#SBATCH --array=1-4%1", "#SBATCH --no-requeue"} <= set(lines) and "#SBATCH --requeue" not in lines


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": 0}, "--nodes=0 must be 1 or more"),
        ({"gpus_per_node": -1}, "--gpus-per-node=-1 must be 0 or more"),
        ({"nproc": None}, "say --gpus-per-node G"),
        ({"nproc": None, "gpus_per_node": None}, "say --gpus-per-node G"),
        ({"time": "tomorrow"}, "is not a time limit of SLURM's: 90"),
        ({"time": "1:00\n"}, "is not a time limit"),
        ({"array": True}, "say --chain N with it"),
        ({"run_dir": Path("/a\\b")}, "use another name"),
    ],
)
def test_what_slurm_would_not_take_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        job(tmp_path, **values)


def test_the_templates_are_where_an_installed_package_has_them():
    assert slurm.TEMPLATES.parent == Path(riverrun.__file__).parent
    assert {"train.sbatch", *slurm.LIBRARY} <= {path.name for path in slurm.TEMPLATES.iterdir()}
    packed = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"riverrun.slurm" = ["*.sbatch", "*.sh"]' in packed


@NEEDS_SHELLCHECK
def test_scripts_are_clean(tmp_path):
    def check(*files, severity="style"):
        options = ["--external-sources", f"--source-path={slurm.TEMPLATES.parent}", f"--severity={severity}"]
        return subprocess.run(["shellcheck", *options, *files], text=True, capture_output=True)

    script = slurm.write(job(tmp_path, overrides=("train.steps=7",), chain=3))
    done = check(script, *slurm.TEMPLATES.iterdir(), Path(__file__).parents[2] / ".ci" / "run")
    assert done.returncode == 0, done.stdout
    done = check(slurm.write(job(tmp_path, overrides=tuple(HOSTILE))), severity="warning")
    assert done.returncode == 0, done.stdout
    script.write_text(script.read_text() + "rm $unquoted\n")
    assert check(script).returncode == 1, "it finds what is wrong"


# the library


def training(run_dir: Path, does: str) -> str:
    """A stand-in for srun that does this."""
    code = f"""
import os, signal, sys, time; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path; from riverrun.train import outcome
from tests.launch.slurm_runs import checkpoints, said
run_dir = Path({str(run_dir)!r})
{does}
"""
    (run_dir.parent / "training.py").write_text(code)
    return f"exec {sys.executable} {run_dir.parent / 'training.py'}"


def end(bin, run_dir, does, **values):
    """One start whose training does this."""
    script = slurm.write(job(run_dir.parent, check=False, **values))
    return run_script(bin, run_dir, script, srun=training(run_dir, does))


def requeued(run_dir) -> bool:
    return any(call[1] == "requeue" for call in calls(run_dir.parent / "bin" / "scontrol.calls"))


@pytest.mark.parametrize(
    ("does", "code", "again", "why"),
    [
        ("checkpoints(run_dir, 9); said(run_dir, 'finished', 0, 'all done')", 0, False, "all done"),
        (
            "checkpoints(run_dir, 6); outcome.request_stop(run_dir, 'requeue'); said(run_dir, 'stopped', 85)",
            0, True, "saved: requeued",
        ),
        (
            "outcome.request_stop(run_dir, 'requeue'); said(run_dir, 'stopped', 85)",
            85, False, "not requeued: no step was done",
        ),
        (
            "checkpoints(run_dir, 6); outcome.request_stop(run_dir, 'stop'); said(run_dir, 'stopped', 85)",
            0, False, "stopped as asked",
        ),
        ("checkpoints(run_dir, 6); said(run_dir, 'running'); sys.exit(7)", 0, True, "crashed, but came from step 4 to"),
        ("said(run_dir, 'failed', 87); sys.exit(7)", 7, False, "giving up: job 12345 crashed without a checkpoint"),
        ("sys.exit(7)", 7, False, "outcome: none"),
        ("pass", 1, False, "outcome: none"),
        ("checkpoints(run_dir, 6); said(run_dir, 'failed', 2, 'mend it'); sys.exit(1)", 2, False, "giving up: mend it"),
    ],
)  # fmt: skip
def test_whether_a_job_is_started_again(bin, run_dir, does, code, again, why):
    checkpoints(run_dir, 3, 4)
    (run_dir / "checkpoints" / "step_00000099.partial").mkdir()
    (run_dir / "checkpoints" / "step_00000098.superseded").mkdir()
    said(run_dir, "stopped", 85, "of an earlier start")
    outcome.request_stop(run_dir, "requeue")
    done = end(bin, run_dir, does)
    assert (done.returncode, requeued(run_dir)) == (code, again) and why in done.stdout, done
    assert (run_dir / "slurm" / "given-up").exists() == ("giving up" in done.stdout or "outcome: none" in done.stdout)


def test_the_number_of_requeues_is_bounded(bin, run_dir):
    does = "checkpoints(run_dir, 6); outcome.request_stop(run_dir, 'requeue'); said(run_dir, 'stopped', 85)"
    end(bin, run_dir, does, max_restarts=2)
    assert requeued(run_dir)
    (run_dir.parent / "bin" / "scontrol.calls").unlink()
    shutil.rmtree(run_dir / "checkpoints")
    script = run_dir / "slurm" / "train.sbatch"
    srun = training(run_dir, does)
    done = run_script(bin, run_dir, script, srun=srun, SLURM_RESTART_COUNT="2")
    assert done.returncode == 85 and not requeued(run_dir) and "was requeued 2 times already" in done.stdout
    done = run_script(bin, run_dir, script, srun=srun, SLURM_RESTART_COUNT="3")  # by SLURM itself, after a node's loss
    assert done.returncode == 1 and "SLURM requeued this job 3 times" in done.stdout


def test_what_ended_a_run_ends_the_jobs_that_wait(bin, run_dir):
    outcome.request_stop(run_dir, "stop")
    done = end(bin, run_dir, "sys.exit(9)")
    assert done.returncode == 0 and "was asked to stop" in done.stdout
    assert not calls(run_dir.parent / "bin" / "srun.calls")
    outcome.withdraw(run_dir)
    (run_dir / "slurm" / "given-up").write_text("bad weather\n")
    done = end(bin, run_dir, "sys.exit(9)")
    assert done.returncode == 1 and "gave up: bad weather" in done.stdout
    said(run_dir, "finished", 0)
    done = end(bin, run_dir, "sys.exit(9)")
    assert done.returncode == 0 and "the run is finished" in done.stdout
    slurm.fresh(run_dir)
    assert end(bin, run_dir, "sys.exit(9)").returncode == 9


def test_the_librarys_words_agree_with_outcome_json(run_dir, tmp_path):
    message = 'disk "full", at 100%, in C:\\x: "state": "finished",'
    said(run_dir, "failed", 87, message)
    script = slurm.write(job(tmp_path)).with_name("riverrun.sh")
    text = """
        run_dir=$1 python=x nproc= grace=1 max_restarts=1 chain=0 check=0 exclude= link=1
        source "$2"; for field in state exit_code message step; do rr_outcome "$field"; done
        rr_newest_step; rr_asked; SLURM_JOB_ID=5 rr_ask_for_requeue; rr_asked"""
    checkpoints(run_dir, 8, 10, 9, 123456789)
    done = subprocess.run(["bash", "-c", text, "bash", run_dir, script], text=True, capture_output=True)
    escaped = message.replace("\\", "\\\\").replace('"', '\\"')
    assert done.stdout.splitlines() == ["failed", "87", escaped, "5", "123456789", "requeue"], done.stderr
    assert outcome.stop_request(run_dir) == "requeue"
    outcome.request_stop(run_dir, "stop")
    subprocess.run(["bash", "-c", text, "bash", run_dir, script], check=True, capture_output=True)
    assert outcome.stop_request(run_dir) == "stop", "a stop is not overruled"


UNTIL_ASKED = """
end = time.monotonic() + 60
while outcome.stop_request(run_dir) is None and time.monotonic() < end: time.sleep(0.02)
checkpoints(run_dir, 6); said(run_dir, 'stopped', 85)
"""


def test_usr1_asks_the_run_to_save(bin, run_dir):
    done = end(bin, run_dir, "os.kill(os.getppid(), signal.SIGUSR1)" + UNTIL_ASKED + "os.kill(os.getppid(), 10)")
    assert done.returncode == 0 and requeued(run_dir) and "saved: requeued" in done.stdout, done


def test_a_signal_before_training_begins_is_not_lost(bin, run_dir):
    script = slurm.write(job(run_dir.parent, check=False))
    with script.with_name("riverrun.sh").open("a") as library:
        library.write("kill -USR1 $$\n")  # as soon as it is read
    done = run_script(bin, run_dir, script, srun=training(run_dir, UNTIL_ASKED))
    assert done.returncode == 0 and requeued(run_dir) and "saved: requeued" in done.stdout, done


def test_a_bad_node_is_named_and_left_out(bin, run_dir):
    script = slurm.write(job(run_dir.parent, exclude="node9"))
    check = 'case "$*" in *doctor*) echo "ok: disk"; echo "bad node: node1 (slow GPU 3)"; exit 86;; esac; exit 5'
    done = run_script(bin, run_dir, script, srun=check)
    found = calls(run_dir.parent / "bin" / "scontrol.calls")
    assert done.returncode == 0 and found[-2][1:] == ["requeue", "12345"], done
    assert found[-1][1:] == ["update", "JobId=12345", "ExcNodeList=node9,node1"]
    assert (run_dir / "slurm" / "exclude").read_text() == "node1\n"
    doctor = calls(run_dir.parent / "bin" / "srun.calls")[0]
    assert doctor[-5:] == ["riverrun.launch.cli", "doctor", "--slurm", "--dir", str(run_dir)]


def test_a_problem_of_all_nodes_ends_the_job(bin, run_dir):
    script = slurm.write(job(run_dir.parent))
    done = run_script(bin, run_dir, script, srun='case "$*" in *doctor*) echo "problem: torch"; exit 1;; esac; exit 5')
    assert done.returncode == 1 and "problem: torch" in done.stdout and "--no-check" in done.stdout
    assert not requeued(run_dir) and len(calls(run_dir.parent / "bin" / "srun.calls")) == 1


def test_each_node_has_caches_and_logs_of_its_own(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/bash\nenv; printf "word %s\\n" "$@"\n')
    interpreter.chmod(0o755)
    env = {
        "PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "RIVERRUN_PYTHON": str(interpreter),
        "RIVERRUN_NPROC": "", "RIVERRUN_RENDEZVOUS": "10.1.2.3:20001", "RIVERRUN_LOGS": "/logs", "RIVERRUN_GRACE": "60",
        "SLURM_NNODES": "4", "SLURM_NODEID": "2", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3",
        "SLURMD_NODENAME": "node3", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "36",
    }  # fmt: skip

    def node() -> tuple[dict[str, str], list[str]]:
        words = ["bash", slurm.TEMPLATES / "node.sh", "--", "recipe", "a b"]
        printed = subprocess.run(words, env=env, text=True, capture_output=True, check=True).stdout.splitlines()
        got = dict(line.split("=", 1) for line in printed if "=" in line and not line.startswith("word "))
        return got, [line[5:] for line in printed if line.startswith("word ")]

    got, words = node()
    caches = tmp_path / f"riverrun-{os.getuid()}"
    assert got["TRITON_CACHE_DIR"] == f"{caches}/triton" and got["TORCHINDUCTOR_CACHE_DIR"] == f"{caches}/inductor"
    assert caches.stat().st_mode & 0o777 == 0o700 and got["OMP_NUM_THREADS"] == "9"
    options = dict(itertools.pairwise(words))
    assert options["--nnodes"] == "4" and options["--node-rank"] == "2" and options["--nproc-per-node"] == "4"
    assert options["--rdzv-id"] == "7-3" and options["--rdzv-endpoint"] == "10.1.2.3:20001"
    assert options["--log-dir"] == "/logs/node3" and options["--shutdown-timeout"] == "60"
    assert words[-5:] == ["riverrun.launch.cli", "train", "--", "recipe", "a b"]

    caches.rmdir()
    caches.symlink_to("/etc")  # somebody else's idea
    got, _ = node()
    assert not got["TRITON_CACHE_DIR"].startswith(str(caches) + "/")

    del env["SLURM_GPUS_ON_NODE"]
    done = subprocess.run(["bash", slurm.TEMPLATES / "node.sh"], env=env, text=True, capture_output=True)
    assert done.returncode == 2 and "--gpus-per-node 0 --nproc N" in done.stderr
