"""The trainable half of DDiT (arXiv 2602.16968, section 3.2): what lets a frozen transformer work with large patches.

Per scale s: a patch embedding, a de-embedding, a residual path, a patch-size vector, and LoRA on the feed-forward
layers of every block. All of them start at zero and are added to what the model computes without training, so a new
adapter changes nothing and the frozen weights, with whatever LoRA their user put on them, stay in use at every scale.
Adding ``delta`` to the model's own projection of pooled patches is the paper's extra projection ``w_s = W M + delta``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddit.config import Coarse, Positions, Start
from ddit.low_rank import CurrentScale, Hook, LayerParts, LowRank, has_parts, key, put_on, take_off
from ddit.models import architecture_for
from ddit.models.base import Architecture, channels_first
from ddit.pretrained import TrainedPart, config_hash


class ScaleParts(nn.Module):
    """The trainable parts of one scale.

    Args:
        features: Latent pixels times channels of a large patch.
        width: Width of the transformer.
        layers: Feed-forward layers, name -> (inputs, outputs).
    """

    def __init__(
        self,
        features: int,
        width: int,
        layers: Mapping[str, Sequence[int]],
        rank: int,
        *,
        residual: bool,
        size_vector: bool,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width, bias=False)
        self.head = nn.Linear(width, features)
        self.residual = nn.Linear(features, features, bias=False) if residual else None
        self.size = nn.Parameter(torch.zeros(width)) if size_vector else None
        self.lora = nn.ModuleDict({key(name): LowRank(i, o, rank) for name, (i, o) in layers.items() if rank})
        for layer in (self.embed, self.head, self.residual):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.head.bias)


@dataclass
class AdapterCall:
    """What passes between an adapter and one call of the transformer."""

    patches: Tensor
    """``[B, N, features]``"""
    correction: Tensor | None = None
    """``[B, N, features]``, what the adapter adds to the velocity of each large patch."""


@dataclass
class Attachment:
    """An adapter's hooks on a transformer."""

    handles: list[RemovableHandle]
    layers: list[nn.Module]

    def remove(self) -> None:
        """Take the adapter off. Safe to call twice."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            take_off(layer)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class PatchAdapter(TrainedPart):
    """Adapter for the scales above 1 of one base model; saved and loaded like any model of diffusers.

    Make a new one with `for_model`. ``save_pretrained(folder)``, ``from_pretrained(folder_or_hub_id, revision=...)``
    and ``push_to_hub(name)`` are those of `diffusers.ModelMixin`, with safetensors only.

    Args:
        base: Class of the transformer.
        base_hash: `ddit.pretrained.config_hash` of the transformer.
        features: Features of one token of the model's own patches.
        width: Width of the transformer.
        layers: Feed-forward layers, name -> [inputs, outputs].
        scales: The scales above 1 it serves.
        rank: Rank of LoRA; 0 leaves it out.
        start: What the adapter adds to, see `ddit.config.Coarse`.
        positions: Positions of large patches, see `ddit.config.Coarse`.
        residual: Whether there is a residual path from the latents to the output.
        size_vector: Whether there is a patch-size vector.
        axes: Axes of the latents that a patch spans, see `ddit.models.base.Architecture`.
        detail_variance: Scale -> variance per channel of what pooling loses, measured on the base's samples; used where
            `ddit.apply` gets none.
        min_sigma: Scale -> lowest noise level that it learnt at; without an entry, it learnt at all of them.
        errors: Scale -> [noise level, root mean square error of its velocity] of the last validation.
        steps_trained: Number of optimiser steps of the run that made it.
        ddit_version: Version of ddit that made it.
    """

    noun = "adapter"

    @register_to_config
    def __init__(
        self,
        base: str,
        base_hash: str,
        features: int,
        width: int,
        layers: dict[str, list[int]],
        scales: tuple[int, ...] = (2, 4),
        rank: int = 32,
        start: Start = "noise-consistent",
        positions: Positions = "grid",
        residual: bool = True,
        size_vector: bool = True,
        axes: int = 2,
        detail_variance: dict[str, list[float]] | None = None,
        min_sigma: dict[str, float] | None = None,
        errors: dict[str, list[list[float]]] | None = None,
        steps_trained: int = 0,
        ddit_version: str = "",
    ) -> None:
        super().__init__()
        parts = {"residual": residual, "size_vector": size_vector}
        self.inputs = {s: features * s**axes for s in scales}
        self.parts = nn.ModuleDict(
            {str(s): ScaleParts(n, width, layers, rank, **parts) for s, n in self.inputs.items()}
        )
        self._state = CurrentScale()
        self._call: AdapterCall | None = None
        self._own = Architecture.own

    @classmethod
    def for_model(
        cls,
        transformer: nn.Module,
        *,
        scales: Sequence[int] = (2, 4),
        rank: int = 32,
        start: Start = "noise-consistent",
        positions: Positions | None = None,
        residual: bool = True,
        size_vector: bool = True,
        detail_variance: Mapping[int, Sequence[float]] | None = None,
        min_sigma: Mapping[int, float] | None = None,
    ) -> PatchAdapter:
        """A new adapter for a transformer, which computes exactly what the model does without one.

        Args:
            positions: By default ``grid`` for ``noise-consistent`` and ``interpolated`` (the paper's) for ``bilinear``.

        Raises:
            ValueError: For an unsupported model, scales that are no powers of two above 1, or a negative rank.
        """
        from ddit import __version__

        architecture = architecture_for(transformer)
        if not scales or any(s < 2 or s & (s - 1) for s in scales) or len(set(scales)) != len(scales):
            raise ValueError(f"scales of an adapter are {tuple(scales)}; they must be distinct powers of two above 1")
        if rank < 0:
            raise ValueError(f"rank is {rank}; it must be at least 0, and 0 leaves LoRA out")
        return cls(
            base=type(architecture.transformer).__name__,
            base_hash=config_hash(architecture.transformer),
            features=architecture.features,
            width=architecture.width,
            layers={name: [layer.in_features, layer.out_features] for name, layer in architecture.feed_forward()},
            scales=tuple(sorted(scales)),
            rank=rank,
            start=start,
            positions=positions or ("grid" if start == "noise-consistent" else "interpolated"),
            residual=residual,
            size_vector=size_vector,
            axes=architecture.axes,
            detail_variance={str(s): list(v) for s, v in (detail_variance or {}).items()},
            min_sigma={str(s): v for s, v in (min_sigma or {}).items()},
            ddit_version=__version__,
        )

    @property
    def coarse(self) -> Coarse:
        """The form of a coarse step that it was trained for."""
        return Coarse(start=self.config["start"], positions=self.config["positions"])

    @property
    def detail_variance(self) -> dict[int, list[float]]:
        return {int(s): v for s, v in (self.config["detail_variance"] or {}).items()}

    @property
    def errors(self) -> dict[int, dict[float, float]]:
        """Scale -> noise level -> error of its velocity, as far as it was validated."""
        return {int(s): {sigma: error for sigma, error in rows} for s, rows in (self.config["errors"] or {}).items()}

    @property
    def scales(self) -> tuple[int, ...]:
        return tuple(self.config["scales"])

    def serves(self, scale: int, sigma: float) -> bool:
        """Whether it has learnt a scale at a noise level."""
        return sigma >= (self.config["min_sigma"] or {}).get(str(scale), 0.0)

    def remark(self, levels: Sequence[float], chosen: Sequence[Sequence[int]]) -> str | None:
        """What to do about a run that used patches where they were not learnt; else ``None``.

        Args:
            levels: Noise level of every step.
            chosen: Scale of each sample, for every step; 0 where it was skipped.
        """
        steps = zip(levels, chosen, strict=True)
        unlearnt = sum(any(s > 1 and not self.serves(s, sigma) for s in scales) for sigma, scales in steps)
        if not unlearnt:
            return None
        learnt = ", ".join(f"{s}p from {sigma:g}" for s, sigma in self.config["min_sigma"].items())
        return (
            f"{unlearnt} steps used large patches at noise levels that the adapter has not learnt ({learnt}): "
            "let full steps come sooner, or train with a lower min_sigma"
        )

    def attach(self, transformer: nn.Module) -> Attachment:
        """Hook the adapter into a transformer; it stays silent outside `at`.

        Hooks sit on the innermost layers, below the wrappers of peft: a user's LoRA may come before or after.

        Raises:
            ValueError: See `check`; also for a transformer with an adapter on it.
        """
        self.check(transformer)
        architecture = architecture_for(transformer)
        self._own = architecture.own
        head = architecture.layer(architecture.head)
        layers = architecture.feed_forward() if self.config["rank"] else []
        if any(has_parts(layer) for _, layer in layers):
            raise ValueError("there is an adapter on this transformer; remove it first")
        embedding = architecture.layer(architecture.embedding)
        handles = [
            embedding.register_forward_hook(Hook(self._embed)),
            head.register_forward_hook(Hook(self._head)),
        ]
        for name, layer in layers:
            lora = {s: self._parts(s).lora[key(name)] for s in self.scales}
            handles.append(put_on(layer, LayerParts(self._state, lora)))
        return Attachment(handles, [layer for _, layer in layers])

    @contextmanager
    def at(self, scale: int, patches: Tensor) -> Iterator[AdapterCall]:
        """The one call of the transformer inside the block runs at ``scale``.

        Args:
            patches: What the adapter sees of each large patch, ``[B, N, features]``, ``N`` tokens of the coarse grid.

        Returns:
            The call, of which ``correction`` is to be added to the velocity afterwards.
        """
        self._join(patches.device)
        call = AdapterCall(patches.to(self.dtype))
        with self.low_rank_at(scale):
            self._call = call
            try:
                yield call
            finally:
                self._call = None

    @contextmanager
    def low_rank_at(self, scale: int) -> Iterator[None]:
        """LoRA belongs to ``scale`` inside the block: for a backward pass that computes blocks a second time."""
        before, self._state.scale = self._state.scale, scale
        try:
            yield
        finally:
            self._state.scale = before

    def _parts(self, scale: int) -> ScaleParts:
        parts = self.parts[str(scale)]
        assert isinstance(parts, ScaleParts)
        return parts

    def _embed(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._call is None:
            return None
        parts = self._parts(self._state.scale)
        added = parts.embed(self._call.patches)
        added = (added if parts.size is None else added + parts.size).to(output.dtype)
        if channels_first(layer):
            return output + added.mT.reshape(output.shape)
        changed = output.clone()
        self._own(changed, added.shape[1]).add_(added)
        return changed

    def _head(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The de-embedding reads what the model's own head reads; its answer takes a path of its own (see `at`)."""
        if self._call is None:
            return
        parts = self._parts(self._state.scale)
        tokens = args[0].mT if channels_first(layer) else args[0]
        correction = parts.head(self._own(tokens, self._call.patches.shape[1]).to(self.dtype))
        if parts.residual is not None:
            correction = correction + parts.residual(self._call.patches)
        self._call.correction = correction
