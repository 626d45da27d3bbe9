"""The GPU's figures as Markdown, written between two marks of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import read
from benchmarks.gpu.train import CHAINS
from ddit.util.files import replacing

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
NONE = "No run on a GPU has been made yet."
NAMES = {"flux": "FLUX.1-dev, 1024 x 1024", "wan": "Wan 2.1 1.3B, 480 x 832 x 81", "peers": "Other libraries' caches"}


def write_table(results: Path, page: Path = PAGE) -> None:
    """Replace what stands between the marks.

    Raises:
        ValueError: For a page without marks, or results of tiny models.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the marks {BEGIN} and {END}")
    with replacing(page) as partial:
        partial.write_text(f"{before}{BEGIN}\n{markdown(results).strip()}\n{END}{after}")


def markdown(results: Path) -> str:
    """All stages of which there are results."""
    found = {name: read(results / f"{name}.json") for name in (*NAMES, *CHAINS)}
    found = {name: stage for name, stage in found.items() if stage.get("values")}
    tiny = [name for name, stage in found.items() if stage["tiny"]]
    if tiny:
        raise ValueError(f"{', '.join(tiny)} in {results} are of tiny models (--tiny), which tell nothing of a GPU")
    parts = []
    for name, stage in found.items():
        part = _training(name, stage) if name in CHAINS else _model(name, stage)
        parts.append(f"{part}\n{_missing(stage)}".strip())
    return "\n\n".join(parts) or NONE


def _model(name: str, stage: dict[str, Any]) -> str:
    values, where = stage["values"], stage["environment"]
    card = stage.get("card", where["device"])
    told = [f"{card}, PyTorch {where['torch']}, diffusers {where['diffusers']}, {where['date']}, random weights"]
    if "matmul" in values:
        told.append(f"{values['matmul']['flops_per_second'] / 1e12:.0f} TFLOP/s in products of large matrices")
    if "weights_bytes" in values:
        told.append(f"{values['weights_bytes'] / 2**30:.1f} GiB of weights")
    lines = [f"### {NAMES[name]}", "", "; ".join(told) + "."]
    if name != "peers":
        lines += _steps(values)
    return "\n".join(lines + _runs(values))


def _steps(values: dict[str, Any]) -> list[str]:
    """A row for each form and scale."""
    head = [
        "",
        "| step | ms | fewer operations | faster | efficiency | of the peak | adapter | GiB |",
        "|---" * 8 + "|",
    ]
    rows, notes = [], []
    for form in ("eager", "compiled"):
        steps = values.get(f"{form}/steps")
        if steps is None:
            continue
        adapted = values.get(f"{form}/adapter", steps)
        for scale, seconds in steps["seconds"].items():
            share, memory = adapted["adapter_share"].get(scale), (steps["peak_memory"] or {}).get(scale)
            rows.append(
                f"| {form}, {scale}p | {1e3 * seconds:.1f} | {steps['flop_ratio'][scale]:.2f}x "
                f"| {steps['time_ratio'][scale]:.2f}x | {steps['efficiency'][scale]:.2f} "
                f"| {steps['utilisation'][scale]:.0%} | {'' if share is None else f'{share:+.1%}'} "
                f"| {'' if memory is None else f'{memory / 2**30:.2f}'} |"
            )
        notes += _notes(form, values)
    return [*head, *rows, "", *notes] if rows else []


def _notes(form: str, values: dict[str, Any]) -> list[str]:
    steps = values[f"{form}/steps"]
    told = [
        f"the rule takes {steps['scheduler_share_of_a_plain_step']:.2%} of a full step, "
        f"with skipping {steps['scheduler_share_with_skipping']:.2%}"
    ]
    first = values.get(f"{form}/first steps")
    if first:
        told += [f"first step with {k}: {v:+.1%}" for k, v in first["overhead"].items() if k != "plain"]
    waits = values.get(f"{form}/host waits")
    if waits:
        told.append(f"the host waits {waits['patches']:.1f} times a step, plain {waits['plain']:.1f}")
    return [f"{form.capitalize()}: " + "; ".join(told) + ".", ""]


def _runs(values: dict[str, Any]) -> list[str]:
    """A row for each whole run; those that were only reckoned say so."""
    runs = {name: value for name, value in values.items() if name.count("/") == 2}
    runs = {n: v for n, v in runs.items() if not (v.get("extrapolated") and n.rpartition(", ")[0] in runs)}
    lines = [
        "",
        "| run | seconds | faster | work | efficiency | steps a cache answered | GiB | graphs |",
        "|---" * 8 + "|",
    ]
    for name, value in runs.items():
        form, total, method = name.split("/")
        plain = runs.get(f"{form}/{total}/plain") or runs.get(f"{form}/{total}/plain, extrapolated")
        seconds = statistics.median(value["seconds"])
        faster = None if plain is None else statistics.median(plain["seconds"]) / seconds
        work, memory = value.get("flops_fraction"), value.get("peak_memory")
        told = [
            f"{seconds:.2f}" + (" (reckoned from single steps)" if value.get("extrapolated") else ""),
            "" if faster is None else f"{faster:.2f}x",
            "" if work is None else f"{work:.1%}",
            "" if work is None or faster is None else f"{faster * work:.2f}",
            str(value.get("reused", "")),
            "" if memory is None else f"{memory / 2**30:.2f}",
            str(value.get("graphs", "")),
        ]
        lines.append(f"| {form}, {total} steps: {method.removesuffix(', extrapolated')} | " + " | ".join(told) + " |")
    return lines if runs else []


def _training(name: str, stage: dict[str, Any]) -> str:
    """A row for each part of each training."""
    where = f"{stage.get('card', stage['environment']['device'])}, {stage['seconds']:.0f} s in all."
    lines = [f"### `{name}`", "", where, "", "| training | stage | step | steps/s | loss |", "|---" * 5 + "|"]
    for training, parts in stage["values"].get("progress", {}).items():
        for part, log in parts.items():
            speed = 1 / log["seconds"] if log.get("seconds") else log.get("steps_per_s")
            loss = log.get("loss", log.get("error"))
            lines.append(
                f"| {training} | {part} | {log['step']} | {'' if speed is None else f'{speed:.1f}'} | {loss:.4f} |"
            )
    return "\n".join(lines)


def _missing(stage: dict[str, Any]) -> str:
    """What is not there, by name."""
    told = [f"{name} ({why})" for name, why in stage.get("left_out", {}).items()]
    told += [f"{name} (failed: {why.splitlines()[0][:120]})" for name, why in stage.get("errors", {}).items()]
    return f"\nMissing: {'; '.join(told)}." if told else ""
