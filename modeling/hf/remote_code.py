"""The model's source as files of an export, so that transformers can load it where Riverrun is not installed.

`AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)` copies a Python file and the files that it imports
relatively from the folder, and knows no sub-folders. So the modules that `riverrun.modeling.model` imports, directly or
not, become flat files whose imports of each other are relative: `from riverrun.kernels.ssd import ssd` in
`modeling/mixers/mamba2.py` becomes `from .kernels_ssd import ssd` in `modeling_mixers_mamba2.py`.

transformers also refuses to load files that import a package which is missing, unless the import stands in a `try`: so
imports of anything but torch, transformers and the standard library (Triton, in the kernels) are wrapped in one.
"""

import ast
import re
import sys
from pathlib import Path

import riverrun

MODEL = "riverrun.modeling.model"
CONFIG_CLASS, MODEL_CLASS = "RiverrunConfig", "RiverrunForCausalLM"
ALLOWED = ("riverrun.modeling.", "riverrun.kernels.")
AVAILABLE = {"torch", "transformers", *sys.stdlib_module_names}
HEADER = "# Part of Riverrun, licensed under Apache-2.0. Exported from {module}.\n"


def auto_map() -> dict[str, str]:
    """Where transformers finds the classes. Both go through the model's file, so that its modules are loaded once."""
    file = _flat(MODEL)
    return {"AutoConfig": f"{file}.{CONFIG_CLASS}", "AutoModelForCausalLM": f"{file}.{MODEL_CLASS}"}


def write_remote_code(folder: Path) -> list[str]:
    """Write the files into `folder`; returns their names."""
    files = bundle()
    for name, source in files.items():
        (folder / name).write_text(source, encoding="utf-8")
    return sorted(files)


def bundle(root: str = MODEL) -> dict[str, str]:
    """File name → source of `root` and everything of Riverrun that it imports.

    Raises:
        ValueError: a module imports in a way that cannot be made flat, or something outside modeling/ and kernels/.
    """
    files: dict[str, str] = {}
    queue, seen = [root], {root}
    while queue:
        module = queue.pop()
        if (path := _path(module)) is None:
            raise ValueError(f"the source of {module} cannot be found")
        source, imported = _rewrite(module, path.read_text(encoding="utf-8"))
        name = f"{_flat(module)}.py"
        if name in files:
            raise ValueError(f"two modules would become {name}; rename {module}")
        files[name] = HEADER.format(module=module) + source
        queue += sorted(imported - seen)
        seen |= imported
    return files


def _flat(module: str) -> str:
    return module.removeprefix("riverrun.").replace(".", "_")


def _path(module: str) -> Path | None:
    """The file of a module of Riverrun; None: there is no such module."""
    stem = Path(riverrun.__file__).parent.joinpath(*module.split(".")[1:])
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _rewrite(module: str, source: str) -> tuple[str, set[str]]:
    """The source with flat imports, and the modules of Riverrun that it imports."""
    tree, lines, imported = ast.parse(source), source.splitlines(keepends=True), set()
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    guarded = {inner for node in tries for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        where = f"{module}, line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and names[0].startswith(ALLOWED):
            (name,) = names
            if modules := [alias.name for alias in node.names if _path(f"{name}.{alias.name}") or alias.name == "*"]:
                raise ValueError(f"{where}: import names from a module, not {', '.join(modules)} from {name}")
            i = node.lineno - 1
            lines[i], count = re.subn(rf"from\s+{re.escape(name)}\s+import", f"from .{_flat(name)} import", lines[i])
            if count != 1:
                raise ValueError(f"{where}: write `from {name} import` on one line of its own")
            imported.add(name)
        elif any(name.split(".")[0] in ("", "riverrun") for name in names):
            raise ValueError(f"{where}: only `from riverrun.(modeling|kernels).X import Y` can be exported")
        elif node not in guarded and any(name.split(".")[0] not in AVAILABLE for name in names):
            _guard(lines, node, where)
    return "".join(lines), imported


def _guard(lines: list[str], node: ast.stmt, where: str) -> None:
    """Wrap an import statement in a `try` that changes nothing but what transformers sees."""
    first, last, column = node.lineno - 1, node.end_lineno or node.lineno, node.col_offset
    indent = lines[first][:column]
    if indent.strip():
        raise ValueError(f"{where}: put the import on a line of its own, so that it can be exported")
    body = "".join(f"    {line}" if line.strip() else line for line in lines[first:last])
    lines[first] = f"{indent}try:\n{body.rstrip()}\n{indent}except ImportError:\n{indent}    raise\n"
    for i in range(first + 1, last):
        lines[i] = ""
