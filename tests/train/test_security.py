"""What is read is data: no file of a checkpoint, a token store or a model's folder runs code, or leads to another file.

`docs/security.md` lists the formats and who is trusted.
"""

import ast
import inspect
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from riverrun.eval.models import load_model
from riverrun.launch.cli import app
from riverrun.modeling.hf.folder import check_index
from riverrun.modeling.hf.importer import import_model
from riverrun.train import checkpoint, manifest
from riverrun.train.data.tokenizer import load_tokenizer
from riverrun.train.engine import to_universal
from riverrun.train.shards import Shards, Universal, check_files
from riverrun.train.state_passing import StateBuffer
from riverrun.train.universal import reshard

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from tests.train.test_loop import train

ROOT = Path(__file__).parents[2]
FOLDERS = ("train", "modeling", "kernels", "launch", "eval")

FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "cPickle.loads", "dill.load", "dill.loads",
    "cloudpickle.load", "cloudpickle.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open",
    "pandas.read_pickle", "pd.read_pickle", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
    "torch.serialization.add_safe_globals", "eval", "exec", "__import__", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "shutil.unpack_archive",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall"}  # of archives, whose names may lead anywhere
FORBIDDEN_VALUES = {
    ("weights_only", False), ("allow_pickle", True), ("trust_remote_code", True), ("shell", True),
    ("verify_ssl", False),
}  # fmt: skip


def findings(source: str, where: str) -> list[str]:
    """Calls and defaults that let a file, or a text, run code."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full_name(function: ast.expr) -> str:
        if isinstance(function, ast.Attribute):
            return f"{full_name(function.value)}.{function.attr}"
        return names.get(function.id, function.id) if isinstance(function, ast.Name) else "?"

    found = []
    for node in ast.walk(tree):
        at = f"{where}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            name = full_name(node.func)
            if name in FORBIDDEN or name.rpartition(".")[2] in FORBIDDEN_METHODS:
                found.append(f"{at}: {name}")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in FORBIDDEN_VALUES:
                    found.append(f"{at}: {keyword.arg}={value}")
            if name == "torch.load" and not any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                for k in node.keywords
            ):
                found.append(f"{at}: torch.load without weights_only=True")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            defaults = list(zip(arguments[len(arguments) - len(node.args.defaults) :], node.args.defaults))
            defaults += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults) if d is not None]
            found += [
                f"{at}: {argument.arg}={default.value} by default"
                for argument, default in defaults
                if isinstance(default, ast.Constant) and (argument.arg, default.value) in FORBIDDEN_VALUES
            ]
    return found


KNOWN = {  # and why it may be
    "train/watchdog.py: pickle.loads": "what torch's flight recorder returned within this process",
}


def test_the_sources_have_no_dangerous_call():
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += findings(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    unknown = [each for each in found if f"{each.split(':')[0]}:{each.split(':', 2)[2]}" not in KNOWN]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "from pickle import loads as read\nread(b)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import torch as t\nt.load(f, weights_only=safe)",
        "from torch import load\nload(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "import os\nos.system(c)",
        "eval(text)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
        "def load(d, trust_remote_code=True): ...",
        "def load(d, *, trust_remote_code=True): ...",
        "tarfile.open(f).extractall(d)",
    ],
)
def test_each_dangerous_call_would_be_found(source):
    assert findings(source, "x.py")


def test_safe_calls_are_not_found():
    source = """
import torch, numpy as np, subprocess
torch.load(f, weights_only=True)
np.load(f)
np.load(f, allow_pickle=False)
subprocess.run([c])
model.eval()
def load(d, trust_remote_code=False): ...
"""
    assert not findings(source, "x.py")


def test_every_command_trusts_code_only_when_it_is_asked_to():
    def commands(group):
        for command in getattr(group, "commands", {}).values():
            yield command
            yield from commands(command)

    options = [
        option
        for command in commands(typer.main.get_command(app))
        for option in command.params
        if "trust" in (option.name or "")
    ]
    assert len(options) > 3 and all(option.default is False for option in options)
    assert inspect.signature(load_model).parameters["trust_remote_code"].default is False


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path):
    """What must not come to be."""
    mark = tmp_path / "ran"
    yield mark
    assert not mark.exists(), "code of a file was run"


def test_the_example_is_hostile(tmp_path):
    torch.save({"x": Hostile(tmp_path / "ran")}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


MODEL, OPTIMISER = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"


def deepspeed_files(folder, **changes):
    """As little as a checkpoint of stage 1 has, with other values for some files."""
    folder.mkdir(parents=True, exist_ok=True)
    counters = {"global_steps": 1, "global_samples": 1, "skipped_steps": 0}
    values = {
        MODEL: {"param_shapes": [{"w": torch.Size([2])}], "shared_params": {}, **counters},
        OPTIMISER: {
            "optimizer_state_dict": {
                "single_partition_of_fp32_groups": [],
                "base_optimizer_state": {"state": {}},
                "param_slice_mappings": [],
            }
        },
    }
    for name, value in (values | changes).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, folder / name)
    return folder


@pytest.mark.parametrize("victim", [MODEL, OPTIMISER])
def test_shards_run_no_code(tmp_path, mark, victim):
    folder = deepspeed_files(tmp_path / "zero", **{victim: {"x": Hostile(mark)}})
    for read in (lambda: Shards(folder, {}), lambda: check_files(folder)):
        with pytest.raises(ValueError, match=r"could run code.*Use a checkpoint that Riverrun wrote") as raised:
            read()
        assert str(folder / victim) in str(raised.value)


def test_universal_checkpoints_run_no_code(tmp_path, mark):
    folder = deepspeed_files(tmp_path, **{"zero/w/fp32.pt": {"param": Hostile(mark)}})
    found = Universal(folder)
    with pytest.raises(ValueError, match="could run code"):
        found["w"]


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02cos\nsystem\n.", b"PK\x03\x04"])
def test_files_that_are_not_torch_s_are_refused(tmp_path, content):
    folder = deepspeed_files(tmp_path)
    (folder / MODEL).write_bytes(content)
    with pytest.raises(ValueError, match=r"model_states\.pt .*use another checkpoint"):
        Shards(folder, {})


@pytest.mark.parametrize(
    "name, value", [(MODEL, {}), (MODEL, [1]), (MODEL, None), (OPTIMISER, {}), (OPTIMISER, {"optimizer_state_dict": 3})]
)
def test_other_tables_than_deepspeed_s_are_refused(tmp_path, name, value):
    folder = deepspeed_files(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="does not hold what DeepSpeed writes"):
        Shards(folder, {})


def test_an_alias_does_not_lead_out_of_a_checkpoint(tmp_path):
    torch.save({"param": torch.ones(2)}, tmp_path / "fp32.pt")
    counters = {"global_steps": 1, "global_samples": 1, "skipped_steps": 0}
    described = {"param_shapes": [], "shared_params": {"v": "../../.."}, **counters}
    folder = deepspeed_files(tmp_path / "a" / "b", **{MODEL: described, "zero/w/fp32.pt": {"param": torch.ones(2)}})
    with pytest.raises(ValueError, match="does not hold what DeepSpeed writes"):
        Universal(folder)


def test_passed_states_run_no_code(tmp_path, mark):
    torch.save({"first": 0, "layers": [Hostile(mark)]}, tmp_path / "00000.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        StateBuffer(0, 1, 1, torch.device("cpu")).restore(tmp_path)


def test_a_manifest_does_not_lead_out_of_its_checkpoint(tmp_path):
    """A file outside may well fit: it is not looked at."""
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    secret = folder.parent / "secret"
    secret.write_text("secret")
    for name in ("../secret", str(secret), "zero/../../secret"):
        entry = manifest.measure(secret)
        table = {"step": 1, "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256}}}
        (folder / "manifest.json").write_text(json.dumps(table))
        said: list[str] = []
        assert checkpoint.latest(tmp_path, said.append) is None
        assert "stays within the checkpoint" in said[0]


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
}  # fmt: skip


def test_pickled_weights_of_a_model_run_no_code(tmp_path, mark):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    torch.save({"model.embed_tokens.weight": Hostile(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path, device="cpu")
    values = LLAMA | {"architectures": ["Mamba2ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="only as pickle"):
        import_model(tmp_path)


@pytest.mark.parametrize("architecture", ["OddForCausalLM", "RiverrunForCausalLM"])
def test_code_beside_a_model_is_not_run(tmp_path, mark, architecture):
    auto_map = {"AutoConfig": "odd.C", "AutoModelForCausalLM": "odd.M", "AutoTokenizer": ["odd.T", None]}
    values = {"architectures": [architecture], "model_type": "odd", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Odd", "auto_map": auto_map}))
    (tmp_path / "odd.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(ValueError):
        load_model(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)


def test_an_index_of_weights_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["Mamba2ForCausalLM"]}))
    for name, target in (
        ("model.safetensors.index.json", "../../etc/passwd"),
        ("pytorch_model.bin.index.json", "../../../../etc/passwd"),
        ("model.safetensors.index.json", "/etc/passwd"),
    ):
        (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": {"x": target}}))
        with pytest.raises(ValueError, match=r"lacks .*etc/passwd"):
            check_index(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        with pytest.raises(ValueError, match=r"lacks .*etc/passwd"):
            load_model(tmp_path, device="cpu")
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["Mamba2ForCausalLM"]}))
        if name.startswith("model"):
            with pytest.raises(ValueError, match=r"lacks .*etc/passwd"):
                import_model(tmp_path)
        (tmp_path / name).unlink()


def test_arrays_of_objects_are_not_read(tmp_path, mark):
    """NumPy's own default, on which nothing here relies: token stores are raw numbers."""
    np.save(tmp_path / "x.npy", np.array([Hostile(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "x.npy")


def test_a_run_does_not_resume_from_a_checkpoint_that_runs_code(tmp_path):
    """DeepSpeed would unpickle what we refuse; also one whose manifest fits it."""
    run_dir, mark = tmp_path / "run", tmp_path / "ran"
    assert train(run_dir, "kill", 9)[0] != 0
    newest = checkpoint.checkpoints(run_dir)[-1]
    victim = next(newest.glob("zero/*optim_states.pt"))
    content = torch.load(victim, weights_only=False)
    torch.save({**content, "surprise": Hostile(mark)}, victim)
    (newest / manifest.NAME).unlink()
    checkpoint.describe(newest, checkpoint.read_state(newest))
    code, printed = train(run_dir)
    assert code != 0 and "could run code: it was not read" in printed and str(victim) in printed, printed
    with pytest.raises(ValueError, match="could run code: it was not read"):
        reshard(run_dir, tmp_path / "universal")
    assert not mark.exists() and not (tmp_path / "universal").exists()


@pytest.mark.parametrize("named", [5, {"a": 1}, [], [5], None])
def test_a_config_that_names_no_architecture(tmp_path, named):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": named}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("victim", [MODEL, OPTIMISER])
def test_deepspeed_s_converter_gets_no_file_that_could_run_code(tmp_path, mark, victim):
    folder = deepspeed_files(tmp_path / "zero", **{victim: {"x": Hostile(mark)}})
    with pytest.raises(ValueError, match="could run code"):
        to_universal(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[", b"{}", b"[1]", b"[" * 10**5, b'{"step": -1, "recipe": {}, "layout": "universal"}',
        b'{"step": 1, "recipe": {}, "layout": {"tp": "1"}}', b'{"step": 1, "recipe": 5, "layout": "universal"}',
    ],
)  # fmt: skip
def test_a_trainer_s_state_that_nobody_wrote(tmp_path, content):
    (tmp_path / "trainer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"trainer\.json is not what Riverrun writes"):
        checkpoint.read_state(tmp_path)
