"""What video models share: latents ``[B, C, F, H, W]``, condition channels, and frames that are given, not drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall
from ddit.patches import TokenLayout


class VideoArchitecture(Architecture):
    """One that is called with latents ``[B, C + K, F, H, W]``, which it cuts into patches of 1 x p x p itself.

    The K channels behind those of the latents are a condition; the answer has none. Given frames have no noise: they
    are pooled as conditions are, and keep timestep 0.
    """

    def read(self, inputs: Inputs) -> Noisy:
        own = self.patches
        if own != (1, self.patch_size, self.patch_size):
            raise UnsupportedCall(f"the model's own patches are {own}, not {(1, self.patch_size, self.patch_size)}")
        x = inputs["hidden_states"]
        condition = x[:, self.channels :] if self.given(inputs) is None else x
        return Noisy(x[:, : self.channels], self.sigma(inputs), condition if condition.shape[1] else None)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        latents, condition, given = noisy.latents, noisy.condition, self.given(inputs)
        timestep = noisy.sigma * self.time_scale
        if given is not None:
            assert condition is not None, "read() gave one"
            clean, condition = condition[:, : self.channels], condition[:, self.channels :]
            latents = torch.where(given[:, None, :, None, None], clean.to(latents), latents)
        if inputs["timestep"].ndim == 2:
            levels = timestep[:, None] if given is None else timestep[:, None] * ~given
            timestep = self._spread(levels, inputs, layout)
        x = latents if condition is None else torch.cat([latents, condition.to(latents)], dim=1)
        return {**inputs, "hidden_states": x, "timestep": timestep, "return_dict": False}

    @property
    def patches(self) -> tuple[int, int, int]:
        """Frames, height and width of the model's own patches, as its configuration says."""
        config = self.transformer.config
        return (config.patch_size_t, config.patch_size, config.patch_size)  # type: ignore[union-attr, return-value]

    def given(self, inputs: Inputs) -> Tensor | None:
        """Frames that are given rather than drawn ``[B, F]``; ``None`` where all have the noise level of the call.

        Raises:
            UnsupportedCall: Where the others' noise levels differ.
        """
        timestep, frames = inputs["timestep"], inputs["hidden_states"].shape[2]
        if timestep.ndim == 1 or timestep.shape[1] == 1:
            return None
        levels = timestep.unflatten(1, (frames, -1))
        given = (levels == 0).all(2)
        if not ((levels == timestep.amax(1)[:, None, None]).all(2) | given).all():
            raise UnsupportedCall("frames have noise levels of their own, which one patch size can't serve")
        return given

    def sigma(self, inputs: Inputs) -> Tensor:
        level = super().sigma(inputs)
        return level if level.ndim == 1 else level.amax(1)

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        return velocity

    @staticmethod
    def _spread(levels: Tensor, inputs: Inputs, layout: TokenLayout) -> Tensor:
        """Timesteps of frames ``[B, F]`` or ``[B, 1]`` as the call has them: per frame, or for each of its tokens."""
        told, frames = inputs["timestep"].shape[1], inputs["hidden_states"].shape[2]
        return levels if told in (1, frames) else levels.repeat_interleave(math.prod(layout.grid), dim=1)


def frame_positions(layout: TokenLayout, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of every token ``[F rows columns]``, float32, frame by frame."""
    places = layout.places()
    rows, columns = places.repeat(frames, 1).T
    return torch.arange(frames).float().repeat_interleave(len(places)), rows, columns
