"""lm-evaluation-harness runs our models: on local tasks, with the numbers that it gets for their exports itself."""

import json
import subprocess
import sys

import pytest
import torch
from eval_examples import TEXTS, hybrid
from lm_eval.api.instance import Instance

from riverrun.eval.lm_eval import RiverrunLM
from riverrun.modeling.hf.export import export_model
from riverrun.train.data.tokenizer import ByteTokenizer

TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1}
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
metadata: {version: 1}
""",
    "continued": """
task: continued
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1}
""",
}


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    docs = [{"text": t, "choices": [" one", " and two", "x"], "gold": i % 3} for i, t in enumerate(TEXTS)]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


COMMANDS = """
import json, sys
from riverrun.launch.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["riverrun", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def run_harness(tasks, *runs):
    """The command for each (out, model, arguments), one after the other in a process of their own, which imports the
    harness once."""
    options = ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--log_samples", "--device", "cpu"]
    commands = [
        ["eval", "lm-eval", "run", "--model", model, "--model_args", arguments, "--output_path", str(out), *options]
        for out, model, arguments in runs
    ]
    done = subprocess.run([sys.executable, "-c", COMMANDS, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def read(out):
    """Its results, and its samples by task."""
    (results,) = out.rglob("results_*.json")
    samples = {name: next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines() for name in TASKS}
    return json.loads(results.read_text()), {n: [json.loads(line) for line in lines] for n, lines in samples.items()}


def test_the_harness_itself_on_local_tasks(saved, tasks, tmp_path):
    """As for the exported model, which transformers runs."""
    model = hybrid()
    export_model(model.config, model.state_dict(), tmp_path / "export", tokenizer_dir=saved, target="riverrun")
    options = f"trust_remote_code=True,dtype=float32,prefix_token_id={ByteTokenizer.eos_id}"
    mine, hf = tmp_path / "ours", tmp_path / "hf"
    run_harness(
        tasks,
        (mine, "riverrun", f"path={saved}"),
        (hf, "hf", f"pretrained={tmp_path / 'export'},{options}"),
    )
    (ours, our_samples), (theirs, their_samples) = read(mine), read(hf)
    assert ours["config"]["model"] == "riverrun" and ours["config"]["model_sha"]
    for task in TASKS:
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (task, name)
        for a, b in zip(our_samples[task], their_samples[task], strict=True):
            assert a["doc_id"] == b["doc_id"]
            if task == "continued":
                assert a["resps"] == b["resps"]


def request(*arguments):
    return Instance("loglikelihood", {}, arguments, 0)


def test_scores_are_those_of_the_whole_text(saved):
    model, text = RiverrunLM(str(saved), device="cpu", batch_size=3), ByteTokenizer()
    pairs = [("Riverrun,", " past Eve"), ("", "né"), ("x", ""), ("from swerve of shore", " to"), ("a", "b")]
    for (context, continuation), (score, greedy) in zip(pairs, model.loglikelihood([request(*pair) for pair in pairs])):
        before = text.encode(context) or [text.eos_id]
        ids = torch.tensor([before + text.encode(continuation)])
        with torch.no_grad():
            log_p = hybrid()(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
        targets = ids[0, len(before) :]
        assert score == pytest.approx(log_p.gather(1, targets[:, None]).sum().item(), abs=1e-4)
        assert greedy == bool((log_p.argmax(-1) == targets).all())


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_batches_and_streams_change_nothing(saved, monkeypatch, batch_size):
    requests = [request(text[:4], text[4:]) for text in TEXTS if len(text) > 4]
    alone = RiverrunLM(str(saved), device="cpu", batch_size=1)
    model = RiverrunLM(str(saved), device="cpu", batch_size=batch_size)
    for (a, g), (b, h) in zip(alone.loglikelihood(requests), model.loglikelihood(requests)):
        assert a == pytest.approx(b, abs=1e-4) and g == h
    documents = [request(text) for text in TEXTS]
    whole = alone.loglikelihood([request("", text) for text in TEXTS])
    monkeypatch.setattr("riverrun.eval.lm_eval.PREFILL_CHUNK", 7)
    windows = RiverrunLM(str(saved), device="cpu", max_length=4096).loglikelihood_rolling(documents)
    for streamed, window, (score, _) in zip(model.loglikelihood_rolling(documents), windows, whole):
        assert streamed == pytest.approx(score, abs=1e-4) and window == pytest.approx(score, abs=1e-4)


def test_generation_ends_at_any_of_the_strings(saved):
    model = RiverrunLM(str(saved), device="cpu")
    (free,) = model.generate_until([request("Riverrun", {"max_gen_toks": 20})])
    assert len(free) > 3
    end = free[2:4]
    (cut,) = model.generate_until([request("Riverrun", {"max_gen_toks": 20, "until": ["never", end]})])
    assert cut == free.split(end)[0]


def test_what_it_does_not_take(foreign, saved):
    with pytest.raises(ValueError, match="not a Riverrun model: use --model hf"):
        RiverrunLM(str(foreign), device="cpu")
    with pytest.raises(ValueError, match="leaves no context within max_length=3"):
        RiverrunLM(str(saved), device="cpu", max_length=3).loglikelihood([request("a", "bcde")])
