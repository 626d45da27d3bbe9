"""Wan 2.1 and 2.2, and its relatives VACE, Animate and SkyReels-V2.

The model itself cuts latents ``[B, C, F, H, W]`` into patches of 1 x 2 x 2, and counts positions from their shape.
Image to video has condition channels behind those of the latents; its output has the latents' channels alone. Frames
that are given have no noise: they are pooled as conditions are, and keep timestep 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from ddit.models.base import Architecture, Inputs, Noisy, UnsupportedCall
from ddit.models.flops import Costs
from ddit.patches import TokenLayout

IMAGE_TOKENS = 257
"""Of the picture that image to video begins with, as its encoder gives them."""


class Wan(Architecture):
    """`diffusers.WanTransformer3DModel`."""

    time_scale = 1000.0
    batched = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "timestep")
    embedding = "patch_embedding"
    rope = "rope"
    block_lists = ("blocks",)
    teacache_first = 5
    feed_forward_names = re.compile(r"blocks\.\d+\.ffn\.net\.(0\.proj|2)")
    costs = Costs(
        rows=(
            (r"condition_embedder\.time_.*", "time"),
            (r"condition_embedder\.text_embedder\..*", "text"),
            (r"condition_embedder\.image_embedder\..*", "picture"),
            (r"blocks\.\d+\.attn2\.to_[kv]", "context"),
            (r"blocks\.\d+\.attn2\.add_[kv]_proj", "added"),
            (r"patch_embedding|proj_out|blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\..*)", "image"),
        ),
        attention=(
            (r"blocks\.\d+\.attn1\.to_q", "image", "image"),
            (r"blocks\.\d+\.attn2\.to_q", "image", "context"),
            (r"blocks\.\d+\.attn2\.add_k_proj", "image", "added"),
        ),
    )

    def read(self, inputs: Inputs) -> Noisy:
        own = tuple(self.transformer.config.patch_size)  # type: ignore[union-attr, arg-type]
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

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        name, batch = "encoder_hidden_states_image", len(inputs["hidden_states"])
        pictures = inputs.get(name)
        if pictures is None or len(pictures) in (1, batch):
            return super().rows(inputs, samples)
        # A sample's first and last frame lie in rows one after the other.
        chosen = super().rows({**inputs, name: pictures.unflatten(0, (batch, -1))}, samples)
        return {**chosen, name: chosen[name].flatten(0, 1)}

    def velocity(self, output: Tensor, size: Sequence[int]) -> Tensor:
        return output

    def output(self, velocity: Tensor, inputs: Inputs) -> Tensor:
        return velocity

    @staticmethod
    def _spread(levels: Tensor, inputs: Inputs, layout: TokenLayout) -> Tensor:
        """Timesteps of frames ``[B, F]`` or ``[B, 1]`` as the call has them: per frame, or for each of its tokens."""
        told, frames = inputs["timestep"].shape[1], inputs["hidden_states"].shape[2]
        return levels if told in (1, frames) else levels.repeat_interleave(math.prod(layout.grid), dim=1)

    def rotary(self, layout: TokenLayout, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> Any:
        rope: Any = self.transformer.get_submodule("rope")
        axes = layout.video_places(args[0].shape[2], args[0].device).T
        waves = [_rotary(dim, axis) for dim, axis in zip((rope.t_dim, rope.h_dim, rope.w_dim), axes, strict=True)]
        pairs = zip(zip(*waves, strict=True), output, strict=True)
        return tuple(torch.cat(parts, dim=1)[None, :, None].to(like) for parts, like in pairs)

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        image = config.image_dim
        return {
            "hidden_states": torch.zeros(1, config.in_channels, frames, height, width),
            "timestep": torch.full((1,), self.time_scale / 2),
            "encoder_hidden_states": torch.zeros(1, text, config.text_dim),
            "encoder_hidden_states_image": torch.zeros(1, IMAGE_TOKENS, image) if image else None,
        }

    def teacache_signal(self, block: Any, argument: Callable[[str], Any]) -> Tensor:
        # The authors watch the timestep's embedding alone (their --use_ret_steps). Where tokens have their own,
        # that of the last frame stands for what is drawn.
        embedding = argument("temb")
        return embedding[:, -1] if embedding.ndim == 4 else embedding

    def teacache_coefficients(self) -> tuple[float, ...] | None:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        if config.in_channels != 16 or config.out_channels != 16:  # From pictures: those for 480p and 720p differ.
            return None
        return {
            (30, 12): (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),  # 1.3B
            (40, 40): (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525),  # 14B
        }.get((config.num_layers, config.num_attention_heads))


class Vace(Wan):
    """`diffusers.WanVACETransformer3DModel`: control latents and a mask of their own embedding and blocks, pooled."""

    batched = (*Wan.batched, "control_hidden_states")
    feed_forward_names = re.compile(r"(vace_)?" + Wan.feed_forward_names.pattern)
    costs = Costs(
        rows=(
            (r"vace_patch_embedding|vace_blocks\.\d+\.proj_(in|out)", "image"),
            *((rf"(vace_)?({pattern})", kind) for pattern, kind in Wan.costs.rows),
        ),
        attention=tuple((rf"(vace_)?{name}", queries, keys) for name, queries, keys in Wan.costs.attention),
    )

    def read(self, inputs: Inputs) -> Noisy:
        control, x = inputs["control_hidden_states"], inputs["hidden_states"]
        if control.shape[3:] != x.shape[3:]:
            sizes = " and ".join("x".join(map(str, t.shape[3:])) for t in (control, x))
            raise UnsupportedCall(f"the control video's latents and those of the video differ in size ({sizes})")
        return replace(super().read(inputs), condition=control)

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        written = super().write(inputs, replace(noisy, condition=None), layout)
        return {**written, "control_hidden_states": noisy.condition}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        control = torch.zeros(1, config.vace_in_channels, frames, height, width)
        return {**super().example(frames, height, width, text), "control_hidden_states": control}

    def teacache_coefficients(self) -> None:
        return None  # Wan's are not measured with control.


class Animate(Wan):
    """`diffusers.WanAnimateTransformer3DModel`: latents of poses are pooled, the face's pixels stay.

    Not counted are the operations of the face's encoders, 0.05 TFLOP a frame whatever the patches.
    """

    batched = (*Wan.batched, "pose_hidden_states", "face_pixel_values")
    costs = Costs(
        rows=(
            (r"pose_patch_embedding", "posed"),
            (r"face_adapter\.\d+\.to_[kv]", "face"),
            (r"face_adapter\.\d+\.to_(q|out)", "image"),
            *Wan.costs.rows,
        ),
        attention=(*Wan.costs.attention, (r"face_adapter\.\d+\.to_q", "image", "head")),
    )

    def read(self, inputs: Inputs) -> Noisy:
        noisy, pose = super().read(inputs), inputs["pose_hidden_states"]
        if noisy.condition is None:  # latents alone, of a finished run
            return noisy
        pose = F.pad(pose, (0, 0, 0, 0, 1, 0))  # The reference frame in front has none.
        return replace(noisy, condition=torch.cat([noisy.condition, pose.to(noisy.condition)], dim=1))

    def write(self, inputs: Inputs, noisy: Noisy, layout: TokenLayout) -> Inputs:
        assert noisy.condition is not None, "read() gave one"
        condition, pose = noisy.condition.split([noisy.condition.shape[1] - self.channels, self.channels], dim=1)
        written = super().write(inputs, replace(noisy, condition=condition), layout)
        return {**written, "pose_hidden_states": pose[:, :, 1:]}

    def further_rows(self, inputs: Inputs) -> dict[str, int]:
        frames = inputs["hidden_states"].shape[2]
        config: Any = self.transformer.config  # type: ignore[union-attr]
        heads = config.face_encoder_num_heads + 1
        return {"posed": self.tokens(inputs) * (frames - 1) // frames, "face": frames * heads, "head": heads}

    def example(self, frames: int, height: int, width: int, text: int) -> Inputs:
        config: Any = self.transformer.config  # type: ignore[union-attr]
        size = config.motion_encoder_size
        return {
            **super().example(frames, height, width, text),
            "pose_hidden_states": torch.zeros(1, self.channels, frames - 1, height, width),
            "face_pixel_values": torch.zeros(1, 3, 4 * (frames - 1) - 3, size, size),
        }


class SkyReels(Wan):
    """`diffusers.SkyReelsV2Transformer3DModel`; diffusion forcing as long as all frames have one noise level."""

    costs = Costs(rows=((r"fps_projection\..*", "sample"), *Wan.costs.rows), attention=Wan.costs.attention)

    def rows(self, inputs: Inputs, samples: Sequence[int]) -> Inputs:
        told = inputs.get("fps")  # one number a sample, no tensor
        chosen = super().rows(inputs, samples)
        return chosen if told is None else {**chosen, "fps": [told[i] for i in samples]}

    def teacache_coefficients(self) -> None:
        return None


def _rotary(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[N, dim]`` of positions ``[N]``, as the model computes them for whole numbers."""
    pos: Any = positions  # annotated for arrays only
    cos, sin = get_1d_rotary_pos_embed(dim, pos, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64)
    return cos, sin
