"""What a forward costs at each scale: counted on the meta device, or timed. Time does not depend on the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddit.adapter import PatchAdapter
from ddit.coarse import call_at
from ddit.config import Coarse
from ddit.eval import timing
from ddit.models import architecture_for
from ddit.models.base import Inputs, to_meta
from ddit.pipelines.known import example, meta_transformer, transformer
from ddit.util.tables import table


def count(
    model: str,
    *,
    height: int = 0,
    width: int = 0,
    frames: int = 1,
    seconds: int = 0,
    scales: Sequence[int] = (1, 2, 4),
    rank: int | None = None,
    blocks: Sequence[int] = (),
) -> dict[str, Any]:
    """Tokens and floating-point operations of one forward of one sample.

    Args:
        model: See `ddit.pipelines.known.meta_transformer`, as for ``blocks``.
        height, width, frames: Of the picture or clip.
        seconds: Of sound.
        rank: Count an adapter of this rank along.

    Raises:
        ValueError: For an unknown model, or sizes that it does not take.
    """
    meta = meta_transformer(model, blocks)
    architecture = architecture_for(meta)
    inputs = example(architecture, model, height, width, frames, seconds)
    if frames > 1 and architecture.read(inputs).latents.ndim < 5:
        raise ValueError(f"{model} makes no clips; name a size without frames, such as {height}x{width}")
    adapter = None if rank is None else PatchAdapter.for_model(meta, scales=[s for s in scales if s > 1], rank=rank)
    rows = {}
    for scale in scales:
        call = call_at(architecture, inputs, scale, Coarse())
        flops = architecture.count_flops(to_meta(call), scale, adapter)
        rows[scale] = {"tokens": architecture.tokens(call), "flops": flops}
    return {
        "model": model,
        "class": type(meta).__name__,
        "blocks": list(blocks) or None,
        "parameters": sum(p.numel() for p in meta.parameters()),
        "height": height,
        "width": width,
        "frames": frames,
        "seconds": seconds,
        "adapter_rank": rank,
        "scales": {s: {**row, "ratio": rows[1]["flops"] / row["flops"]} for s, row in rows.items()},
    }


class Bench:
    """A transformer on a device, to be timed at several sizes.

    Args:
        model: See `ddit.pipelines.known.transformer`, as for the other arguments.
        compile: Compile the repeated blocks, as diffusers recommends.
        attention: Name of one of diffusers' attention backends.
        rank: Time an adapter of this rank along, untrained.

    Raises:
        ValueError: See `ddit.pipelines.known.transformer`; also for an attention backend that does not run here.
    """

    def __init__(
        self,
        model: str,
        *,
        blocks: Sequence[int] = (),
        dtype: str = "bfloat16",
        device: str = "cpu",
        random_weights: bool = False,
        compile: bool = False,
        attention: str | None = None,
        scales: Sequence[int] = (1, 2, 4),
        rank: int | None = None,
    ) -> None:
        self.model = model
        self.transformer = transformer(model, blocks=blocks, dtype=dtype, device=device, random_weights=random_weights)
        self.architecture = architecture_for(self.transformer)
        self.large = [s for s in scales if s > 1]
        if attention is not None:
            try:
                self.transformer.set_attention_backend(attention)
            except Exception as error:  # unknown, not installed, not for this device
                raise ValueError(f"attention {attention!r} can't be used here: {str(error).splitlines()[0]}") from error
        self.compile = compile
        if compile:
            self.transformer.compile_repeated_blocks()
        self.adapter = None
        if rank is not None:
            self.adapter = PatchAdapter.for_model(self.transformer, scales=self.large, rank=rank)
            # Not by diffusers' own `to`, which warns of modules to be kept in float32 where there are none.
            nn.Module.to(self.adapter, device=device, dtype=getattr(torch, dtype))

    def inputs(self, height: int = 0, width: int = 0, frames: int = 1, batch: int = 1, *, seconds: int = 0) -> Inputs:
        """A call with random latents and text."""
        architecture, device, dtype = self.architecture, self.transformer.device, self.transformer.dtype
        made = example(architecture, self.model, height, width, frames, seconds)
        for name in (architecture.batched[0], "encoder_hidden_states"):
            if name in made:
                made[name] = torch.randn_like(made[name])
        placed = {
            k: v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, torch.Tensor) else v
            for k, v in made.items()
        }
        return architecture.rows(placed, [0] * batch)

    def measure(
        self,
        inputs: Inputs,
        *,
        schedule: str = "paper",
        lengths: Sequence[int] = (50,),
        runs: bool = False,
        repeats: int = 15,
        advance: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Single steps, and runs of a schedule as these predict them.

        Args:
            inputs: A call of the transformer, such as `inputs` makes.
            schedule: See `parse_schedule`.
            lengths: Numbers of steps of the runs.
            runs: Time them as well.
            repeats: Medians of so many; of a tenth as many for runs.
            advance: Called after the steps, and after each run that was timed.

        Returns:
            ``steps`` as of `ddit.eval.timing.step_costs`; ``runs``, each with ``schedule`` and ``predicted`` (times
            faster than plain), and what `ddit.eval.timing.run_costs` tells of those that were timed.
        """
        if self.compile:
            torch.compiler.reset()  # sizes of earlier calls would count towards the most graphs that a block may have
        steps = timing.step_costs(self.architecture, inputs, scales=self.large, adapter=self.adapter, repeats=repeats)
        advance()
        made = []
        for total in lengths:
            scales = parse_schedule(schedule, total, steps["flops"])
            predicted = timing.predicted(scales, steps["seconds"] | steps["adapter_seconds"])
            run = {"asked": schedule, "steps": total, "schedule": scales, "predicted": predicted}
            if runs:
                run |= timing.run_costs(
                    self.architecture, inputs, scales, adapter=self.adapter, repeats=max(3, repeats // 10)
                )
                advance()
            made.append(run)
        return {"steps": steps, "runs": made}

    def trace(self, inputs: Inputs, path: Path) -> None:
        """See `ddit.eval.timing.trace`."""
        timing.trace(self.architecture, inputs, self.large, self.adapter, path)


def parse_schedule(text: str, total: int, costs: Mapping[int, float]) -> list[int]:
    """Scales of ``total`` steps: ``paper``, a list, or the first picture's in a JSON file of ``ddit generate``.

    Args:
        costs: Scale -> work of a step.

    Raises:
        ValueError: When the text is none of these, or names a scale that has no cost.
    """
    if text == "paper":
        return timing.paper_like(total, costs)
    try:
        read = json.loads(Path(text).read_text())["scales"][0] if text.endswith(".json") else text.split(",")
        scales = [int(s) for s in read]
        if not scales or set(scales) - set(costs):
            raise ValueError
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"schedule {text!r} is none; give scales of {sorted(costs)} such as 1,1,1,4,2,1, "
            "a JSON file that ddit generate wrote, or paper"
        ) from error
    return (scales + scales[-1:] * total)[:total]


def counts_table(results: Sequence[dict[str, Any]]) -> str:
    """Results of `count` as Markdown: a line each, TFLOPs at every scale and how many times fewer."""
    rows = []
    for r in results:
        cells = [f"{row['tokens']:,}, {row['flops'] / 1e12:.1f}" for row in r["scales"].values()]
        fewer = ", ".join(f"{row['ratio']:.2f}" for s, row in r["scales"].items() if int(s) > 1)
        rows.append([_name(r), _size(r), *cells, fewer])
    head = ["model", "size", *(f"tokens at {s}p, TFLOPs" for s in results[0]["scales"]), "times fewer"]
    return "Floating-point operations of one forward of one sample, counted on the meta device.\n\n" + table(head, rows)


TIMES = """Steps with large patches against a full step: times fewer operations, times faster, and efficiency (the
latter by the former); what they add to the model's own call, an adapter to them, and a change of scale to a
full step; the speed, as a share of that of a large matrix product.

"""
TIMES_HEAD = (
    *("model", "size, batch", "scale", "fewer", "faster", "efficiency"),
    *("around the model", "adapter", "change", "share"),
)


def times_table(results: Sequence[dict[str, Any]]) -> str:
    """Timed results as Markdown: a line for each scale above 1, and one for each run."""
    rows, lines = [], []
    for r in results:
        steps = r["steps"]
        for s in [s for s in steps["flop_ratio"] if s > 1]:
            cells = [
                f"{steps['flop_ratio'][s]:.2f}x",
                f"{steps['time_ratio'][s]:.2f}x",
                f"{steps['efficiency'][s]:.2f}",
                f"{steps['seam_share'][s]:.1%}",
                f"{steps['adapter_share'][s]:.1%}" if s in steps["adapter_share"] else "",
                f"{steps['switch_share'][s]:.1%}",
                f"{steps['utilisation'][s]:.0%} ({steps['utilisation'][1]:.0%} at 1)",
            ]
            rows.append([_name(r), f"{_size(r)}, {steps['batch']}", f"{s}p", *cells])
        rule, skipping = (r["steps"][f"scheduler_share_{how}"] for how in ("of_a_plain_step", "with_skipping"))
        told = [f"the scheduler takes {rule:.2%} of a full step, with skipping {skipping:.2%}"]
        for run in r["runs"]:
            told.append(
                f"{run['steps']} steps, {run['asked']}: {run['predicted']:.2f}x faster by the times of single steps"
                + (f", {run['speedup']:.2f}x in whole runs" if "speedup" in run else "")
            )
        lines.append(f"{_name(r)}, {_size(r)}: " + "; ".join(told) + ".")
    return TIMES + table(TIMES_HEAD, rows) + "\n" + "\n".join(lines) + "\n"


def _name(result: dict[str, Any]) -> str:
    blocks = result["blocks"]
    return result["model"] + (f" ({' + '.join(map(str, blocks))} blocks)" if blocks else "")


def _size(result: dict[str, Any]) -> str:
    if result.get("seconds"):  # not in files of earlier versions
        return f"{result['seconds']} s"
    return f"{result['height']} x {result['width']}" + (f" x {result['frames']}" if result["frames"] > 1 else "")
