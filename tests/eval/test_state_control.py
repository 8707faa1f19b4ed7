"""`--state-control`: evaluations of a model under a control, apart from those of the model itself."""

import pytest
from eval_examples import read_json, write_store
from typer.testing import CliRunner

from riverrun.eval.models import load_model
from riverrun.launch.cli import app

TEXTS = ["a river runs past and past and on, " * 8] * 9


def test_a_controlled_model_is_another_one_to_results_and_samples(saved):
    plain, same = load_model(saved), load_model(saved, state_control="retention=1.0")
    assert (same.fingerprint, same.description, same.state_control) == (plain.fingerprint, plain.description, {})
    windowed = load_model(saved, state_control="window=16,dt_scale=0.5")
    assert windowed.state_control == {"dt_scale": 0.5, "window": 16}
    assert windowed.fingerprint != plain.fingerprint and "with dt_scale=0.5,window=16" in windowed.description
    mixer = windowed.model.model.layers[0].mixer
    assert mixer.state_control.window == 16 and plain.model.model.layers[0].mixer.state_control is None


def test_length_under_a_control_is_recorded_and_differs(saved, tmp_path):
    store, found = write_store(tmp_path / "long", TEXTS), {}
    for control in (None, "retention=0.9,insertion=0.5", "window=4"):
        folder = tmp_path / "out" / (control or "none")
        args = ["eval", "length", "--model", str(saved), "--data", str(store), "--train-length", "32"]
        args += ["--out", str(folder), "--states", "1", "--chunk-len", "100"]
        result = CliRunner().invoke(app, args + (["--state-control", control] if control else []))
        assert result.exit_code == 0, result.output
        found[control] = read_json(folder / "results.json")
    assert len({r["results"]["length"]["loss,none"] for r in found.values()}) == 3
    assert found[None]["config"]["state_control"] == {}
    assert found["window=4"]["config"]["state_control"] == {"window": 4}

    def retention(control):
        heads = found[control]["details"]["state_statistics"]["heads"]
        return heads[0]["retention"][-1]

    assert retention("retention=0.9,insertion=0.5") < 1e-6 * retention(None)


@pytest.mark.parametrize(
    "control, message", [("rentention=0.9", "is no state control"), ("window=-1", "must be at least 1 token")]
)
def test_what_is_no_control_ends_with_a_message(saved, store, tmp_path, control, message):
    args = ["eval", "length", "--model", str(saved), "--data", str(store), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*args, "--state-control", control])
    assert result.exit_code == 2 and message in result.output


def test_a_foreign_model_has_no_states_to_control(foreign):
    with pytest.raises(ValueError, match="state controls are for mamba2 layers"):
        load_model(foreign, state_control="dt_scale=0.5")
