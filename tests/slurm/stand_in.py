"""Stands in for the interpreter of a job: plays the check of nodes and torchrun, each start as the test has laid down.

RUN_DIR/plan has one line a start: what that start does, of
    save     a checkpoint, one step later than the newest
    crash    ends with an error, without a word
    mistake  ends with an error that the user has to mend
    wait     until the run is asked to stop; then saves and ends as asked
    finish   says that the run is finished
RUN_DIR/bad has the names of nodes that the check finds bad.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from riverrun.launch import run_folder
from riverrun.train import outcome

words = sys.argv[1:]
if "doctor" in words:
    bad = Path(words[words.index("--dir") + 1], "bad")
    name = os.environ["SLURMD_NODENAME"]
    if bad.exists() and name in bad.read_text().split():
        print(f"bad node: {name} (so the test says)")
        sys.exit(outcome.BAD_NODE)
    sys.exit(0)

run_dir = Path(next(word for word in words if word.startswith("--run-dir=")).partition("=")[2])
starts = run_dir / "starts"
done = starts.read_text().splitlines() if starts.exists() else []
step = max(run_folder.newest_step(run_dir), 0)
with starts.open("a") as file:
    file.write(os.environ["SLURM_JOB_ID"] + " " + os.environ["SLURMD_NODENAME"] + "\n")


def say(state, code, message=""):
    outcome.write(run_dir, outcome.Standing(state, step, 100, step, code, message, job=os.environ["SLURM_JOB_ID"]))


def save():
    global step
    step += 1
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


say("running", outcome.FAILED)
for action in (run_dir / "plan").read_text().splitlines()[len(done)].split():
    if action == "save":
        save()
    elif action == "crash":
        sys.exit(1)
    elif action == "mistake":
        say("failed", outcome.USER_ERROR, "this has to be mended")
        sys.exit(1)
    elif action == "wait":
        while outcome.stop_request(run_dir) is None:
            time.sleep(0.05)
        save()
        say("stopped", outcome.STOPPED, "saved")
    else:
        assert action == "finish", action
        say("finished", outcome.FINISHED, "done")
