"""The package as users get it: every module imports from a built wheel, and the folders depend one way."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "modeling", "train", "eval", "launch")
# what each folder may import from the others: launch → train, eval → modeling → kernels
ARROWS = {
    "kernels": {"kernels"},
    "modeling": {"modeling", "kernels"},
    "train": {"train", "modeling", "kernels"},
    "eval": {"eval", "train", "modeling", "kernels"},
    "launch": set(FOLDERS),
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a source imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_follow_the_arrows(folder):
    assert sources(folder)
    for path in sources(folder):
        for name in imported(path):
            top, *rest = name.split(".")
            assert top not in FOLDERS, f"{path} imports {name}: write riverrun.{name}"
            if top == "riverrun" and rest:
                assert rest[0] in ARROWS[folder], f"{path}: {folder}/ must not import riverrun.{rest[0]}"


def test_heavy_dependencies_stay_where_they_belong():
    for folder in FOLDERS:
        for path in sources(folder):
            tops = {name.split(".")[0] for name in imported(path)}
            if path != ROOT / "train" / "engine.py":
                assert "deepspeed" not in tops, f"{path}: only train/engine.py imports deepspeed"
            if folder in ("kernels", "modeling"):
                allowed = {"torch", "triton", "riverrun", *sys.stdlib_module_names}
                allowed |= {"transformers", "safetensors", "huggingface_hub"} if folder == "modeling" else set()
                assert tops <= allowed, f"{path} imports {sorted(tops - allowed)}"


def test_environment_variables_are_read_in_two_places():
    def reads(tree):
        """Uses of os.environ and os.getenv other than setting one variable."""
        stored = {n.value for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)}
        attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n not in stored]
        return [n.attr for n in attributes if n.attr in ("environ", "getenv")]

    for folder in FOLDERS:
        for path in sources(folder):
            if folder != "launch" and path != ROOT / "modeling" / "parallel" / "mesh.py":
                assert not reads(ast.parse(path.read_text())), f"{path} reads the environment"


def test_every_module_imports_from_a_wheel(tmp_path):
    tree = tmp_path / "tree"  # a copy of what is packed: building in the checkout would leave its products there
    tree.mkdir()
    for name in ("riverrun", *FOLDERS, "slurm", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(tree)], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("riverrun-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    packed = {name for name in names if name.endswith(".py") and name.startswith("riverrun/")}
    expected = {f"riverrun/{p.relative_to(ROOT)}" for folder in FOLDERS for p in sources(folder)}
    assert packed == expected | {"riverrun/__init__.py"}
    assert "riverrun/py.typed" in names
    recipes = {f"riverrun/{p.relative_to(ROOT)}" for p in (ROOT / "launch" / "recipes").glob("*.toml")}
    assert recipes and recipes <= set(names)
    assert {f"riverrun/slurm/{name}" for name in ("train.sbatch", "riverrun.sh", "node.sh")} <= set(names)

    modules = sorted(name[:-3].replace("/", ".").removesuffix(".__init__") for name in packed)
    code = "import importlib, sys\n"
    code += f"sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    code += f"modules = {modules!r}\n"
    code += "for m in modules: importlib.import_module(m)\n"
    code += "import riverrun; assert riverrun.__file__.startswith(sys.path[0]), riverrun.__file__\n"
    code += f"ours = [sys.modules[n] for n in {FOLDERS!r} if n in sys.modules]\n"
    code += "assert not ours, ours\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=empty)


def test_transformers_imports_beside_our_kernels_folder():
    code = (
        "from transformers import LlamaForCausalLM, Mamba2ForCausalLM\n"
        "import sys; module = sys.modules.get('kernels')\n"
        f"assert not str(getattr(module, '__file__', '')).startswith({str(ROOT)!r}), module\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_model_needs_no_triton_to_be_loaded():
    """A CPU's torch may come without it, and exported models are loaded there too."""
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton':\n"
        "            raise ImportError('Triton is not installed here')\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import riverrun.modeling.model\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
