"""What README and docs say is true: snippets run, files and links are there, and it stays short."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch

import ddit
import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


class Small:
    """Stands for a pipeline class: loads a shrunken pipeline, which is called as if it were the large one."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def from_pretrained(self, name: str, **settings: Any) -> Any:
        assert name.count("/") == 1 and set(settings) <= {"torch_dtype", "dtype"}
        return self.small(tiny.pipeline())

    def __call__(self, **parts: Any) -> Any:
        return self.small(self.cls(**parts))

    def small(self, pipe: Any) -> Any:
        call = self.cls.__call__

        def small(prompt, **kwargs):
            return call(pipe, prompt, **{"height": 32, "width": 32, "max_sequence_length": 20, **kwargs})

        made: Any = type("Loaded", (type(pipe),), {"__call__": lambda self, *args, **kwargs: small(*args, **kwargs)})
        pipe.__class__ = made
        made.to = lambda self, *_: self
        return pipe


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets_run(page, monkeypatch):
    """One after another, as a reader would paste them; the models are shrunken, folders of adapters made up."""
    monkeypatch.setattr(diffusers, "FluxPipeline", Small(diffusers.FluxPipeline))
    pipe = diffusers.FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
    adapter = ddit.PatchAdapter.for_model(pipe.transformer, rank=2)
    monkeypatch.setattr(ddit.PatchAdapter, "from_pretrained", lambda *_, **__: adapter)
    monkeypatch.setattr("ddit.caches.Cache._enable", lambda *_: None)  # a tiny model has no TeaCache of its own
    page_module = ModuleType("page")
    vars(page_module).update(pipe=pipe, ddit=ddit, FluxPipeline=diffusers.FluxPipeline)
    for text in snippets(page):
        exec(compile(text, page.name, "exec"), vars(page_module))


@pytest.mark.filterwarnings("ignore")
def test_a_request_shares_the_model_and_leaves_it_as_it_is(monkeypatch):
    monkeypatch.setattr(diffusers, "FluxPipeline", Small(diffusers.FluxPipeline))
    pipe = tiny.pipeline().to(torch.bfloat16)
    served = ModuleType("served")
    vars(served).update(pipe=pipe, ddit=ddit, FluxPipeline=diffusers.FluxPipeline)
    (text,) = snippets(ROOT / "docs" / "serving.md")
    exec(compile(text, "serving.md", "exec"), vars(served))
    assert served.request(tiny.PROMPT).size == (32, 32)
    assert served.handle.report.scales and pipe.transformer.dtype == torch.bfloat16


def test_commands_are_ones_that_exist():
    from ddit.cli import parser

    for page in PAGES:
        for block in re.findall(r"```(?:\w*)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = re.sub(r'"[^"]*"', "PROMPT", line).split()
                if words[:1] == ["ddit"]:
                    parser().parse_args(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_readme_is_short():
    """Numbers are those of prose and tables, not of code, links and names (2p, FLUX.1)."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", README, flags=re.DOTALL)
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*x?(?!\w)", prose)) <= 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_no_diary(page):
    assert not re.search(r"figures? not kept|an earlier version|the version before", page.read_text())


def test_what_training_takes_is_what_dry_runs_counted():
    """Memory in GiB and hours of the table of adapters."""
    row = r"^\| (\w+)[^|]+\| ([\d.]+) GiB \| ([\d.]+) h \| ([\d.]+) h"
    rows = re.findall(row, (ROOT / "docs" / "adapters.md").read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == ["FLUX", "Wan"]
    for name, *told in rows:
        counted = json.loads((ROOT / "docs" / "results" / f"training-{name.lower()}.json").read_text())
        memory, work = counted["bytes"]["total"] / 2**30, counted["work"]
        assert told == [f"{n:.1f}" for n in (memory, work["training_hours"], work["drawing_hours"])]


def test_savings_are_those_that_were_counted():
    """Every row of the table of models stands in a result that a command has written."""
    row = r"^\| ([\w.-]+) \| ([\d x s]+) \| ([\d.,]+) \| ([\d.]+)x fewer \| ([\d.]+)x fewer \|$"
    rows = re.findall(row, (ROOT / "docs" / "models.md").read_text(), re.MULTILINE)
    counted = {}
    for kind in ("pictures", "video", "sound"):
        for count in json.loads((ROOT / "docs" / "results" / f"flops-{kind}.json").read_text())["counts"]:
            size = tuple(count[name] for name in ("height", "width", "frames", "seconds"))
            counted[count["model"], size] = [count["scales"][s] for s in ("1", "2", "4")]
    assert {row[0] for row in rows} == {name for name, _ in counted}
    for name, size, full, *ratios in rows:
        height, width, frames = ([int(n) for n in size.split(" x ")] + [1])[:3] if "x" in size else (0, 0, 1)
        seconds = int(size.split()[0]) if size.endswith(" s") else 0
        one, *coarse = counted[name, (height, width, frames, seconds)]
        assert full == f"{one['flops'] / 1e12:,.1f}"
        assert ratios == [f"{scale['ratio']:.1f}" for scale in coarse]
