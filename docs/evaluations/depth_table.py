"""What depth.sh found: table.md with perplexities, what chains of layers answer, and what iterations change. Its
argument is the folder."""

import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
MODELS = {"recurrent": "recurrent depth", "fixed": "fixed depth"}
METHODS = {
    "base": "as it is",
    "search": "search",
    "random": "random chains",
    "held_out": "held-out choice",
    "iterations": "iterations alone",
}


def results(model: str, task: str) -> dict | None:
    """None if it was not evaluated in time."""
    path = out / model / task / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return [f"| {' | '.join(row)} |" for row in lines] + [""]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def perplexities() -> list[str]:
    """A column for each number of iterations; the model of fixed depth has one figure."""
    found, fixed = results("recurrent", "perplexity"), results("fixed", "perplexity")
    lines: list[str] = []
    if found is not None:
        depths, of = found["configs"]["perplexity_by_depth"]["num_steps"], found["results"]["perplexity_by_depth"]
        shown = {"perplexity": "{:.3f}", "loss": "{:.4f}", "distance": "{:.1e}", "kl": "{:.1e}"}
        rows = [[name, *(form.format(of[f"{name}_r{r},none"]) for r in depths)] for name, form in shown.items()]
        lines += table(["recurrent depth, iterations", *map(str, depths)], rows)
    if fixed is not None:
        of = fixed["results"]["perplexity"]
        lines += [f"fixed depth: perplexity {of['perplexity,none']:.3f}, loss {of['loss,none']:.4f}", ""]
    return lines


def chains() -> list[str]:
    rows = []
    for model, called in MODELS.items():
        if (found := results(model, "cola")) is None:
            continue
        of, costs = found["results"]["cola"], found["details"]["cola"]["costs"]
        for method, name in METHODS.items():
            if f"accuracy_{method},none" not in of:
                continue
            figures = (of.get(f"{what}_{method},none") for what in ("accuracy", "shorter", "saved", "corrected"))
            passes = f"{costs[method]['passes']:,}" if method in costs else "–"
            rows.append([called, name, *map(percent, figures), passes])
    heads = ["model", "chains", "right, %", "shorter, %", "saved, %", "corrected, %", "passes"]
    return table(heads, rows) if rows else []


def iterations() -> list[str]:
    """Shares after other numbers of iterations than the model's, and how many of the chains found have as many."""
    if (found := results("recurrent", "cola")) is None:
        return []
    of = found["details"]["cola"]["iterations"]
    numbers = sorted({int(n) for n in of["by_number"]}.union(*(map(int, own) for own in of["histogram"].values())))
    rows = [
        [
            f"**{n}**" if n == of["as_it_is"] else str(n),
            *(percent(of["by_number"].get(str(n), {}).get(name)) for name in ("right", "changed")),
            *(str(own.get(str(n), 0)) for own in of["histogram"].values()),
        ]
        for n in numbers
    ]
    return table(["iterations", "right, %", "changed, %", *(METHODS[name] for name in of["histogram"])], rows)


def training() -> list[str]:
    rows = []
    for model, called in MODELS.items():
        path = out / model / "metrics.jsonl"
        if not path.exists():
            continue
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        last = [record for record in records if record["kind"] == "train"][-1]
        evaluated = results(model, "perplexity") or results(model, "cola")
        number = f"{evaluated['config']['model_num_parameters']:,}" if evaluated else "–"
        rows.append([called, number, str(last["step"]), f"{last['tokens_per_second']:,.0f}", f"{last['loss']:.3f}"])
    return table(["model", "parameters", "steps", "tokens/s at the end", "training loss"], rows)


lines = [*training(), *perplexities(), *chains(), *iterations()]
(out / "table.md").write_text("\n".join(lines), encoding="utf-8")
