"""Z-Image: `diffusers.ZImageTransformer2DModel`.

The pipelines hand over a list of latents ``[C, 1, H, W]``, time that runs from 0 (noise) to 1, and a list of prompts of
any lengths; the model answers ``x - eps``. It cuts 2 x 2 patches itself, counts their rows and columns from 0 (a coarse
grid is to it a smaller picture), and fills up image and prompt to multiples of 32 tokens: ``[image | fill | prompt |
fill]``. Guidance is stacked in one call.

The model has a patch size of its own to choose: layers by patch size (``all_x_embedder["2-1"]``) and an argument of
``forward``. ddit passes it by. The weights hold layers of size 2 alone, and a coarse step needs no others: it gives
them pooled patches, and an adapter adds to them what layers of a larger size would learn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall, centre_waves
from ddit.models.flops import Costs
from ddit.patches import TokenLayout, pool_tokens

_BLOCK = r"\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])"


class ZImage(Architecture):
    guidance_off = 0.0
    batched = ("x", "t", "controlnet_block_samples")
    residuals = ("controlnet_block_samples",)
    timestep = "t"
    embedding = "all_x_embedder.2-1"
    head = "all_final_layer.2-1.linear"
    block_lists = ("layers",)
    block_counts = ("n_layers",)
    feed_forward_names = re.compile(r"(noise_refiner|layers)\.\d+\.feed_forward\.w[123]")
    costs = Costs(
        rows=(
            (r"t_embedder\.mlp\.\d|.*\.adaLN_modulation\.\d", "sample"),
            (r"all_x_embedder\.2-1|noise_refiner" + _BLOCK, "filled image"),
            (r"cap_embedder\.1|context_refiner" + _BLOCK, "filled text"),
            (r"all_final_layer\.2-1\.linear|layers" + _BLOCK, "sequence"),
        ),
        attention=(
            (r"noise_refiner\.\d+\.attention\.to_q", "filled image", "filled image"),
            (r"context_refiner\.\d+\.attention\.to_q", "filled text", "filled text"),
            (r"layers\.\d+\.attention\.to_q", "sequence", "sequence"),
        ),
    )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
        """With latents as a tensor ``[B, C, 1, H, W]``, which the model takes as well as a list."""
        inputs = super().bind(args, kwargs)
        latents = [x[-1] if isinstance(x, list) else x for x in inputs["x"]]  # Omni: the last is what is drawn
        return {**inputs, "x": torch.stack(latents)}

    def read(self, inputs: Inputs) -> Noisy:
        if inputs.get("image_noise_mask") is not None:
            raise UnsupportedCall("reference images lie in one sequence with the prompts between them (Omni)")
        if inputs.get("patch_size", self.patch_size) != self.patch_size:
            raise UnsupportedCall(f"the call itself chooses patches of {inputs['patch_size']}, not {self.patch_size}")
        return Noisy(inputs["x"].squeeze(2), self.sigma(inputs))

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        grid = TokenLayout.of(inputs["x"], self.patch_size).grid
        changed = {"x": noisy.latents.unsqueeze(2), "t": 1 - noisy.sigma, "return_dict": False}
        return {**inputs, **changed, **self.pooled_residuals(inputs, layout, grid)}

    def velocity(self, output: Any, size: Sequence[int]) -> Tensor:
        return -torch.stack(list(output)).squeeze(2)

    def output(self, velocity: Tensor, inputs: Inputs) -> Any:
        """A list of ``[C, 1, H, W]``."""
        return list(-velocity.unsqueeze(2))

    def sigma(self, inputs: Inputs) -> Tensor:
        return 1 - super().sigma(inputs)

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        """The longest prompt decides how long a sequence is, and a ControlNet's residuals with it."""
        some = {**super().rows(inputs, samples), "cap_feats": [inputs["cap_feats"][sample] for sample in samples]}
        given = some.get("controlnet_block_samples")
        if given is None:
            return some
        length = self.further_rows(some)["sequence"]
        return {**some, "controlnet_block_samples": {block: x[:, :length] for block, x in given.items()}}

    def pooled_residuals(self, inputs: Inputs, layout: TokenLayout, grid: tuple[int, ...]) -> Inputs:
        """Those of a ControlNet: block -> ``[B, sequence, width]``. What fills up the image gets none."""
        given, count = inputs.get("controlnet_block_samples"), prod(grid)
        if given is None or layout.grid == grid:
            return {}

        def pooled(x: Tensor) -> Tensor:
            image = pool_tokens(x[:, :count], grid, layout.scale)
            filled = F.pad(image, (0, 0, 0, _filled(image.shape[1]) - image.shape[1]))
            return torch.cat([filled, x[:, _filled(count) :]], dim=1)

        return {"controlnet_block_samples": {block: pooled(x) for block, x in given.items()}}

    @staticmethod
    def own(tokens: Tensor, count: int) -> Tensor:
        """The embedding sees the filled up images of all samples in a row ``[B N, width]``."""
        return (tokens.unflatten(0, (-1, _filled(count))) if tokens.ndim == 2 else tokens)[:, :count]

    @contextmanager
    def placed(self, layout: TokenLayout) -> Iterator[None]:
        """What derives positions is no module, so waves are changed in place where the first block gets them.

        The sequence of image and prompt takes them over from there.
        """
        if layout.positions == "grid":
            yield
            return

        def move(block: Any, args: tuple[Any, ...]) -> None:
            config: Any = self.transformer.config  # type: ignore[union-attr]
            first, *dims = config.axes_dims
            waves, moved = args[2], centre_waves(layout, dims, config.rope_theta)
            waves[:, : len(moved), first // 2 :] = moved.to(waves, non_blocking=True)  # of [B, N, half a head]

        handle = self.transformer.get_submodule("noise_refiner.0").register_forward_pre_hook(move)
        try:
            yield
        finally:
            handle.remove()

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        image, text = _filled(self.tokens(inputs)), _longest(inputs["cap_feats"])
        return {"filled image": image, "filled text": text, "sequence": image + text}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        most = min(config.axes_lens[1:])
        if max(height, width) > most * self.patch_size:
            raise ValueError(f"the model has positions for {most} rows and columns of tokens; take a smaller size")
        return {
            "x": torch.zeros(1, config.in_channels, 1, height, width),
            "t": torch.full((1,), 0.5),
            "cap_feats": torch.zeros(1, text, config.cap_feat_dim),
        }


def _filled(count: int) -> int:
    """Tokens in a sequence that is filled up."""
    return count + -count % 32


def _longest(prompts: Any) -> int:
    """Tokens of the longest prompt ``[tokens, features]``, filled up; those of Omni have several parts."""
    return max(sum(_filled(len(part)) for part in (p if isinstance(p, list) else [p])) for p in prompts)
