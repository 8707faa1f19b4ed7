"""What universal.sh found: table.md, a line a task and model. Argument: its folder."""

import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
MODELS = {"act": "halting", "steps": "all steps", "shallow": "as many parameters", "deep": "as deep"}


def shown(at: dict) -> str:
    """An accuracy, and the share of strings without an error."""
    return f"{at['accuracy']:.3f}, {at['exact']:.2f}"


lines: list[str] = []
for path in sorted(out.glob("*/runs.jsonl")):
    task, _, model = path.parent.name.rpartition("-")
    for line in path.read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        found = run["result"]["by_length"]
        if not lines:
            lines = ["| task | model | steps | " + " | ".join(str(at["length"]) for at in found) + " |"]
            lines.append("|---|---|---:|" + "---:|" * len(found))
        lines.append(f"| {task} | {MODELS[model]} | {run['result']['steps']} | {' | '.join(map(shown, found))} |")
(out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
