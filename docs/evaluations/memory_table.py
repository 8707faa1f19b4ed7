"""What memory.sh found: table.md, a line a model. Arguments: its folder, and the length that was read."""

import json
import sys
from pathlib import Path

out, length = Path(sys.argv[1]), int(sys.argv[2])
places = [length // 8, length // 4, length // 2, length]


def loss_at(buckets: list[dict], position: int) -> str:
    """Of the bucket that ends at a position, or that holds it."""
    return next((f"{b['loss']:.3f}" for b in buckets if b["first"] <= position <= b["last"]), "–")


heads = ["model", "steps", "tokens/s at the end", *(f"loss at {place:,}" for place in places), "verdict"]
lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
for path in sorted(out.glob("*/length/results.json")):
    folder = path.parents[1]
    of = json.loads(path.read_text(encoding="utf-8"))["details"]["length"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if record["kind"] == "train"][-1]
    losses = [loss_at(of["by_position"], place) for place in places]
    cells = [folder.name, str(last["step"]), f"{last['tokens_per_second']:,.0f}", *losses, of["verdict"]]
    lines.append(f"| {' | '.join(cells)} |")
(out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
