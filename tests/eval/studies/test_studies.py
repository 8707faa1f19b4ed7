"""Training, sweeping, resuming and reporting studies; the command; wrong input."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from riverrun.eval.studies import sweep
from riverrun.eval.studies.report import cells, plot, rich_tables, rows, write_report
from riverrun.eval.studies.run import Result, Run
from riverrun.eval.studies.scoring import Accuracy, accuracy, wilson
from riverrun.eval.studies.side_by_side import train_side_by_side
from riverrun.eval.studies.sweep import Finished, Study, best_rates, run_study
from riverrun.eval.studies.task import IGNORED
from riverrun.eval.studies.tasks import make_task
from riverrun.eval.studies.trainer import train
from riverrun.launch.commands.study import study as command
from riverrun.modeling.depth.universal_options import UniversalOptions

CPU = torch.device("cpu")
PARITY = Run(
    "parity", "para_lstm", learning_rate=1e-2, seed=0, layers=1, width=32, steps=400, batch_size=32, train_length=16,
    test_lengths=(64,), validate_every=25, held_out_rows=128,
    mixer_options={"max_recurrent_weight": 4.0, "conv_kernel": 1, "num_heads": 1},
)  # fmt: skip
TINY = Study(
    "reverse_string", ("para_gru", "attention"), learning_rates=(1e-3, 1e-2), seeds=(0, 1), layers=1, width=8, steps=4,
    batch_size=4, train_length=4, test_lengths=(6, 8), validate_every=2, held_out_rows=8,
)  # fmt: skip


def without_seconds(finished: list[Finished]) -> list[Finished]:
    return [Finished(run, replace(result, seconds=0.0)) for run, result in finished]


# scoring


def test_wilson_by_hand():
    """Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, n), expected in table.items():
        assert wilson(hits / n, n) == pytest.approx(expected, abs=5e-5)


def test_accuracy_weighs_rows_alike_and_skips_what_is_not_asked():
    targets = np.array([[1, IGNORED, IGNORED], [1, 2, 3]])
    found = accuracy(np.array([[1, 5, IGNORED], [1, 0, 0]]), targets, 3)
    assert found.accuracy == pytest.approx((1 + 1 / 3) / 2) and found.exact == 0.5 and found.rows == 2


# training


def test_parity_is_learnt_holds_on_longer_rows_and_stops_early():
    result = train(PARITY, CPU)
    assert result.score == 1 and result.steps < PARITY.steps
    assert [each.length for each in result.by_length] == [16, 64]
    assert all(each.accuracy >= 0.99 for each in result.by_length)
    assert result.losses[-1][1] < 0.1 < result.losses[0][1]


def test_without_patience_every_step_is_trained():
    """One token is its own parity: perfect at once."""
    easy = replace(PARITY, mixer="attention", mixer_options={}, train_length=1, test_lengths=(), validate_every=2)
    first, never = (train(replace(easy, steps=100, patience=patience), CPU).steps for patience in (1, 0))
    assert first < 100 == never


def test_the_seed_decides_everything():
    short = replace(PARITY, steps=6, validate_every=2)
    state = torch.get_rng_state()
    first, again = train(short, CPU), train(short, CPU)
    assert replace(first, seconds=0) == replace(again, seconds=0)
    assert train(replace(short, seed=1), CPU).losses != first.losses
    assert (torch.get_rng_state() == state).all()


def test_a_universal_transformer_is_trained_with_its_options():
    universal = {"max_steps": 3, "random_offset": 9, "ponder_weight": 0.5}
    run = replace(PARITY, task="copy", mixer="attention", mixer_options={}, universal=universal, steps=3)
    model = run.make_model(CPU)
    assert model.config.options.universal == UniversalOptions(**universal)
    result, other = train(run, CPU), train(replace(run, universal=universal | {"ponder_weight": 0.0}), CPU)
    difference = result.losses[0][1] - other.losses[0][1]
    assert result.steps == 3 and 0.5 * 2 < difference < 0.5 * 4, "half of N + R"
    assert replace(run, universal=None).make_model(CPU).config.options.universal is None


@pytest.mark.parametrize("curriculum", ["single", "multi"])
def test_a_curriculum_goes_on(curriculum):
    """N-DMS of 2 and 3 is within an LSTM's convolution."""
    run = replace(
        PARITY, task="n_dms", mixer="gru", mixer_options={}, task_options={"curriculum": curriculum}, steps=400,
        train_length=3, test_lengths=(2, 3), validate_every=20,
    )  # fmt: skip
    result = train(run, CPU)
    by_n = {each.length: each.accuracy for each in result.by_length}
    assert result.score == 3 and by_n[3] > 0.95 and result.steps < run.steps
    assert (by_n[2] > 0.95) == (curriculum == "multi")  # the only head has moved on, and nothing tells it which N


def test_a_curriculum_that_ends_early_counts_what_it_reached():
    run = replace(
        PARITY, task="n_parity", mixer="gru", mixer_options={}, steps=60, train_length=16, test_lengths=(2,),
        validate_every=20,
    )  # fmt: skip
    result = train(run, CPU)
    passed, rest = divmod(result.score, 1)
    assert 0 <= passed < 5 and 0.3 < rest < 1 and result.steps == 60


# the sweep


def test_a_study_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    whole = run_study(TINY, tmp_path / "whole", CPU)
    write_report(TINY, whole, tmp_path / "whole")
    trained: list[Run] = []

    def cut_off(run, *args):
        trained.append(run)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(run, *args)

    monkeypatch.setattr(sweep, "train", cut_off)
    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, folder, CPU)
    with open(folder / "runs.jsonl", "ab") as file:
        file.write(b'{"key": "torn')
    finished = run_study(TINY, folder, CPU)
    assert trained[:4] == TINY.runs()[:4] and trained[4:] == TINY.runs()[3:]
    assert without_seconds(finished) == without_seconds(whole)
    write_report(TINY, finished, folder)
    assert (folder / "study.md").read_text() == (tmp_path / "whole" / "study.md").read_text()
    assert len((folder / "runs.jsonl").read_text().splitlines()) == len(TINY.runs()) == 8

    run_study(TINY, folder, CPU)
    assert len(trained) == 4 + 5


def test_runs_side_by_side_are_those_of_one_process(tmp_path):
    planned = replace(TINY, mixers=("para_gru",), seeds=(0,))
    reports: list[tuple[int, str]] = []

    def kept(finished: list[Finished], missing: int) -> None:
        write_report(planned, finished, tmp_path / "two")
        reports.append((missing, (tmp_path / "two" / "study.md").read_text()))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = run_study(planned, tmp_path / "one", CPU)
    torch.set_num_threads(threads)
    two = run_study(planned, tmp_path / "two", CPU, kept=kept, jobs=2)
    assert len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a.run == b.run and a.result.steps == b.result.steps
        assert dict(b.result.losses) == pytest.approx(dict(a.result.losses), rel=1e-4)
    assert [missing for missing, _ in reports] == [1, 0]
    assert "1 of 2 runs, so far." in reports[0][1] and "–" in reports[0][1] and "so far" not in reports[1][1]
    assert len((tmp_path / "two" / "runs.jsonl").read_text().splitlines()) == 2


def test_a_run_that_fails_beside_others_stops_none_and_is_named():
    good, ended = replace(PARITY, steps=1, validate_every=1), []
    with pytest.raises(RuntimeError, match=r"1 of 2 runs failed.*para_lstm, learning rate 0\.01, seed 7: steps=0 must"):
        for run, result in train_side_by_side([replace(good, seed=7, steps=0), good], CPU, 2):
            ended.append((run, result.steps))
    assert ended == [(good, 1)]


def test_another_study_is_refused(tmp_path):
    one = replace(TINY, mixers=("para_gru",), learning_rates=(1e-2,), seeds=(0,), steps=1)
    run_study(one, tmp_path, CPU)
    with pytest.raises(ValueError, match=r"another study \(steps: 1 there, 2 here\): give --out another folder"):
        run_study(replace(one, steps=2), tmp_path, CPU)
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match="line 1 is not a result of a run: remove the line"):
        run_study(one, tmp_path, CPU)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        run_study(one, tmp_path, CPU)
    (tmp_path / "study.json").unlink()
    with pytest.raises(ValueError, match=r"holds runs\.jsonl but no study\.json"):
        run_study(one, tmp_path, CPU)


def test_every_setting_is_part_of_the_key():
    changes = {
        "task": "s3", "mixer": "lstm", "learning_rate": 1.0, "seed": 1, "layers": 2, "width": 16, "steps": 1,
        "batch_size": 1, "train_length": 1, "test_lengths": (1,), "validate_every": 1, "held_out_rows": 1,
        "task_options": {"a": 1}, "mixer_options": {}, "patience": 0, "version": 0, "universal": {"max_steps": 1},
    }  # fmt: skip
    assert changes.keys() == asdict(PARITY).keys()
    keys = {replace(PARITY, **{name: value}).key() for name, value in changes.items()}  # type: ignore[arg-type]
    assert len(keys | {PARITY.key()}) == len(changes) + 1
    assert replace(PARITY).key() == PARITY.key()


def test_studies_from_before_an_option_existed_go_on(tmp_path):
    """What is None is no part of a key or of study.json."""
    one = replace(TINY, mixers=("para_gru",), learning_rates=(1e-2,), seeds=(0,), steps=1)
    run_study(one, tmp_path, CPU)
    saved = json.loads((tmp_path / "study.json").read_text())
    assert "universal" not in saved and one.universal is None
    with pytest.raises(ValueError, match=r"another study \(universal: None there, \{'max_steps': 2\} here\)"):
        run_study(replace(one, universal={"max_steps": 2}), tmp_path, CPU)
    (tmp_path / "study.json").write_text(json.dumps(saved | {"later": 1}))
    with pytest.raises(ValueError, match=r"another study \(later: 1 there, None here\)"):
        run_study(one, tmp_path, CPU)


def results(by_rate: dict[float, list[tuple[float, float]]]) -> list[Finished]:
    """A mixer's (score, accuracy at a test length) by learning rate and seed."""
    return [
        Finished(
            replace(PARITY, learning_rate=rate, seed=seed),
            Result(score, [Accuracy(16, 8, score, 0, 1, 0), Accuracy(64, 8, far, 0, 1, 0)], 1, [], 0.0),
        )
        for rate, pairs in by_rate.items()
        for seed, (score, far) in enumerate(pairs)
    ]


def test_the_rate_is_chosen_by_the_training_length_alone():
    far_is_better = results({1e-3: [(0.8, 1.0), (0.8, 1.0)], 1e-2: [(0.7, 0.0), (1.0, 0.0)]})
    assert best_rates(far_is_better) == {"para_lstm": 1e-2}
    assert best_rates(results({1e-2: [(1.0, 1.0)], 1e-3: [(1.0, 0.0)]})) == {"para_lstm": 1e-3}


# the report


def test_tables_and_plot(tmp_path):
    planned = replace(
        TINY,
        task="parity",
        mixers=("para_lstm",),
        learning_rates=(1e-4, 1e-3, 1e-2),
        train_length=16,
        test_lengths=(64,),
    )
    finished = results({1e-4: [(0.5, 0.5)] * 2, 1e-3: [(1.0, 0.75), (0.5, 0.25)], 1e-2: [(0.5, 0.5)] * 2})
    (row,) = rows(planned, finished)
    assert row.learning_rate == 1e-3 and not row.at_edge
    assert [str(point) for point in row.points] == ["0.750 (0.50–1.00)", "0.500 (0.25–0.75)"]
    (main, body), (_, rates) = cells(planned, finished)
    assert main == "accuracy, mean over 2 seeds (lowest–highest seed); chance 0.5"
    assert body[0] == ["mixer", "learning rate", "length 16", "length 64"]
    assert rates == [["mixer", "0.0001", "0.001", "0.01"], ["para_lstm", "0.5", "0.75", "0.5"]]
    assert len(rich_tables(planned, finished)) == 2
    edge = replace(planned, learning_rates=(1e-3, 1e-2))
    assert rows(edge, [each for each in finished if each.run.learning_rate > 1e-4])[0].at_edge

    write_report(planned, finished, tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "| para_lstm | 0.001 | 0.750 (0.50–1.00) | 0.500 (0.25–0.75) |" in text and "study.png" in text
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plot_shows_chance_and_each_mixer(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    plot(replace(TINY, task="s3", learning_rates=(1e-2,)), results({1e-2: [(1.0, 0.5)]}), tmp_path / "a.png")
    axes = plt.gcf().axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["chance"].get_linestyle() == "--" and set(lines["chance"].get_ydata()) == {1 / 6}
    assert list(lines["para_lstm"].get_xdata()) == [16, 64] and list(lines["para_lstm"].get_ydata()) == [1.0, 0.5]
    monkeypatch.undo()
    plt.close(plt.gcf())


# the command

SMALL: dict[str, Any] = {
    "layers": 1, "width": 8, "steps": 2, "batch_size": 4, "train_length": 4, "test_lengths": "8", "lr": "1e-3",
    "seeds": 1, "held_out": 8,
}  # fmt: skip


def test_the_command_writes_everything(tmp_path, capsys):
    options = ["gated_delta.num_householder=2", "mqar.vocabulary=16", "mqar.num_kv_pairs=1"]
    command("mqar", mixer="gated_delta, slstm", overrides=options, device="cpu", out_dir=tmp_path, **SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs.jsonl", "study.json", "study.md", "study.png"]
    line = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])
    assert line["run"]["mixer_options"] == {"num_householder": 2} and line["device"] == "cpu"
    assert line["run"]["task_options"] == {"vocabulary": 16, "num_kv_pairs": 1}
    text = (tmp_path / "study.md").read_text()
    assert "- gated_delta.num_householder: 2\n" in text and "- mqar.vocabulary: 16\n" in text
    assert "gated_delta" in capsys.readouterr().out


def test_the_command_compares_universal_transformers(tmp_path):
    options = ["universal.max_steps=2", "universal.halting=none", "addition.least_first=false"]
    command("addition", mixer="attention", overrides=options, device="cpu", out_dir=tmp_path, **SMALL)
    line = json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])
    assert line["run"]["universal"] == {"max_steps": 2, "halting": "none"}
    text = (tmp_path / "study.md").read_text()
    assert "- universal.max_steps: 2\n" in text and "- addition.least_first: False\n" in text


@pytest.mark.parametrize(
    "task, changes, message",
    [
        ("party", {}, r"no task 'party': did you mean parity\? choose from mqar, s3"),
        ("parity", {"mixer": "mamba"}, r"no mixer 'mamba': did you mean mamba2\? choose from attention"),
        ("parity", {"mixer": ","}, "mixers .*name at least one"),
        ("parity", {"mixer": "gru,gru"}, "each only once"),
        ("parity", {"lr": "fast"}, "--lr 'fast' must be numbers with commas"),
        ("parity", {"lr": "-1"}, "learning rate -1.0 must be positive"),
        ("parity", {"lr": ""}, "learning_rates .*name at least one"),
        ("parity", {"test_lengths": "1.5"}, "--test-lengths '1.5' must be whole numbers"),
        ("parity", {"test_lengths": "0"}, "no sequences of length 0: the shortest is 1"),
        ("parity", {"width": 0}, "width=0 must be at least 1"),
        ("parity", {"overrides": ["gru"]}, "must look like gated_delta.num_householder=2"),
        ("parity", {"overrides": ["elman.expand=2"]}, "no task or mixer in this study called 'elman'"),
        ("parity", {"overrides": ["parity.x=2"]}, r"parity has no options: leave out parity\.x"),
        ("parity", {"overrides": ["gru.expnd=2"]}, r"option of gru called 'expnd': did you mean expand\?"),
        ("parity", {"overrides": ["gru.expand=big"]}, "gru.expand='big': input should be a valid number"),
        ("parity", {"overrides": ["gru.head_dim=3"]}, r"gru\.head_dim=3 must divide .* try "),
        ("mqar", {"test_lengths": "7"}, "even length of at least 4 for 1 pairs, not 7"),
        ("mqar", {"overrides": ["mqar.vocabulary=2"]}, "vocabulary=2 must be even and at least 4"),
        ("mqar", {"overrides": ["mqar.num_passes=0"]}, "num_passes=0 must be at least 1"),
        ("mqar", {"overrides": ["mqar.power_a=0"]}, "power_a=0.0 must be positive"),
        ("mqar", {"overrides": ["mqar.num_kv_pairs=0"]}, "num_kv_pairs=0 must be at least 1"),
        ("n_dms", {}, r"n_dms ends at N = 4 and cannot be tested at \[8\]: raise --train-length"),
        ("n_dms", {"overrides": ["n_dms.advance_above=1"], "test_lengths": "3"}, "advance_above=1.0 must be in"),
        ("n_dms", {"overrides": ["universal.max_steps=2"], "test_lengths": "3"}, "has a curriculum, which trains no"),
        ("copy", {"mixer": "attention", "overrides": ["universal.steps=2"]}, "of universal called 'steps': did"),
        ("copy", {"mixer": "attention", "overrides": ["universal.max_steps=0"]}, "universal.max_steps=0 must be at"),
        ("n_dms", {"overrides": ["n_dms.curriculum=multy"]}, "n_dms.curriculum='multy': input should be 'single'"),
    ],
)  # fmt: skip
def test_wrong_input_is_told(task, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        command(task, **({"mixer": "gru", "device": "cpu", "out_dir": tmp_path / "out"} | SMALL | changes))
    assert not (tmp_path / "out").exists()


def test_the_help_names_every_task_and_imports_nothing_heavy():
    import subprocess
    import sys

    from riverrun.eval.studies.tasks import TASKS
    from riverrun.launch.commands.study import TASKS as NAMED

    assert NAMED.replace(" or ", ", ").split(", ") == list(TASKS)
    code = "import sys, riverrun.launch.commands.study; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == "set()"


def test_every_task_trains_with_its_defaults_shrunk():
    for name in ("mqar", "s5", "copying", "stack_manipulation", "missing_duplicate", "n_parity"):
        length = 32 if name == "mqar" else 6
        run = replace(
            PARITY, task=name, mixer="mamba2", mixer_options={}, steps=2, width=16,
            layers=make_task(name).defaults.layers, train_length=length, test_lengths=(length,), held_out_rows=4,
            validate_every=1,
        )  # fmt: skip
        result = train(run, CPU)
        assert result.steps == 2 and len(result.by_length) == 1


def test_the_default_settings_are_possible():
    from riverrun.eval.studies.tasks import TASKS
    from riverrun.modeling.mixer_options import OPTIONS

    for name, task in TASKS.items():
        d = task.defaults
        for mixer in OPTIONS:
            Run(
                name, mixer, d.learning_rates[0], 0, d.layers, d.width, d.steps, d.batch_size, d.train_length,
                d.test_lengths, validate_every=1, held_out_rows=1,
            ).check()  # fmt: skip


def test_the_folder_may_be_new(tmp_path):
    one = replace(TINY, mixers=("attention",), learning_rates=(1e-2,), seeds=(0,), steps=1)
    assert len(run_study(one, Path(tmp_path, "a", "b"), CPU)) == 1
