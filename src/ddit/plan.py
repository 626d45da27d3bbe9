"""What `ddit.apply` has settled, and `ddit.handle.Handle` carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddit.adapter import PatchAdapter
from ddit.caches import Config
from ddit.coarse import coarse_call
from ddit.config import Coarse, PatchSchedule
from ddit.log import Log
from ddit.models.base import Architecture, Inputs, Noisy, to_meta
from ddit.report import Report
from ddit.run import RunState, Skipping
from ddit.sampler import Sampler
from ddit.schedule import Policy, Rule


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that `ddit.apply` has settled, before anything is changed."""

    architectures: Sequence[Architecture]
    called: Sequence[Any]
    """What the pipeline calls: their transformers, or ``torch.compile``'s wrappers around these."""
    pipe: Callable[[], Any]
    """Gives the pipeline that ddit was applied to, ``None`` where there is none any more: its transformer outlives it.
    """
    policy: Policy
    measure: PatchSchedule
    """How statistics are measured, for a policy that needs them."""
    coarse: Coarse
    variance: dict[int, Tensor]
    """Scale -> variance of the detail per channel."""
    adapter: PatchAdapter | None = None
    make_skipper: Callable[[], Skipping] | None = None
    """Makes that of a new run."""
    speedup: float | None = None
    """What was asked for."""
    cache: Config | None = None
    costs: Mapping[int, float] = field(default_factory=dict)
    """Scale -> work of a step in full steps, in place of the model's own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked for in words, for `Handle.__repr__`."""

    def new_run(
        self, arch: Architecture, inputs: Inputs, noisy: Noisy | None, scheduler: Any, told: int | None
    ) -> RunState:
        """The state at the beginning of a run.

        Args:
            inputs: Its first call.
            noisy: What that is about; ``None`` where it can't run with large patches.
            scheduler: Its sampler, where one is known.
            told: See `ddit.sampler.run_of`.
        """
        sampler, examples = Sampler.of(scheduler, told), self.examples(arch, inputs, noisy)
        return RunState(
            self.policy,
            self.measure,
            None if self.make_skipper is None else self.make_skipper(),
            sampler,
            costs=self.work(arch, examples),
            log=Log(sampler.total, examples),
        )

    def examples(self, arch: Architecture, inputs: Inputs, noisy: Noisy | None) -> dict[int, Inputs]:
        """Inputs of one sample at every scale, without data: from these, costs are counted when asked for."""
        one = arch.rows(inputs, [0])
        if noisy is None:
            return {1: to_meta(one)}
        scales = [s for s in self.policy.scales if s > 1]
        with torch.no_grad():
            coarse = {s: coarse_call(arch, one, noisy.rows([0]), s, self.coarse).inputs for s in scales}
        return {s: to_meta(example) for s, example in {1: one, **coarse}.items()}

    def report(self, log: Log) -> Report:
        """What a run took, and what that saved."""
        scales = sorted({1, *(s for step in log.steps for s in step.scales if s)})
        arch = self.architectures[0]
        tokens = {s: arch.tokens(log.examples[s]) for s in scales}
        flops = {s: arch.count_flops(log.examples[s], s, self.adapter) for s in scales}
        return Report(tuple(log.steps), tokens, flops, log.forced, log.reused_share, self.speedup)

    def remark(self, log: Log) -> str | None:
        """What to do about a whole run that was not what an adapter or a dynamic schedule is for; else ``None``."""
        chosen, sigmas, said = [step.scales for step in log.steps], [step.sigma for step in log.steps], None
        if self.adapter is not None:
            said = self.adapter.remark(sigmas, chosen)
        if said is None and isinstance(self.policy, Rule):
            said = self.policy.remark(chosen, [step.statistics for step in log.steps], sigmas)
        if said is None and self.speedup is not None and not self.costs:  # the report knows the model's own
            said = self.report(log).remark(skipping=self.make_skipper is not None)
        return said

    def work(self, arch: Architecture, examples: Mapping[int, Inputs]) -> dict[int, float]:
        """Scale -> work of a step in full steps, where anybody asks."""
        if self.make_skipper is None and not getattr(self.policy, "needs_costs", False):
            return {}
        flops = {s: arch.count_flops(example, s, self.adapter) for s, example in examples.items()}
        return {0: 0.0, **{s: n / flops[1] for s, n in flops.items()}, **self.costs}
