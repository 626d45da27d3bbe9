"""Work told at the costs of another model, usually one too large to be drawn with here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ddit.caches import Config, answered_share
from ddit.models import architecture_for
from ddit.pipelines.known import cost_ratios, meta_transformer
from ddit.report import Report


@dataclass(frozen=True)
class Prices:
    """Of a model by its name (`ddit.pipelines.known.names`).

    Raises:
        ValueError: When there is no configuration of an image or video model.
    """

    model: str
    scales: tuple[int, ...] = (1, 2, 4)

    def __post_init__(self) -> None:
        _ = self.ratios

    @property
    def ratios(self) -> dict[int, float]:
        """Scale -> work of a step in full steps."""
        return cost_ratios(self.model, self.scales)

    @cached_property
    def lists(self) -> list[int]:
        """Number of blocks in each of its lists."""
        architecture = architecture_for(meta_transformer(self.model))
        lists: list[Any] = [architecture.transformer.get_submodule(name) for name in architecture.block_lists]
        return [len(blocks) for blocks in lists]

    def price(self, report: Report, cache: Config | None) -> Report:
        """The same run, with the same cache, at these costs."""
        share = report.reused_share if cache is None else answered_share(cache, self.lists)
        return replace(report, flops={scale: self.ratios[scale] for scale in report.flops}, reused_share=share)
