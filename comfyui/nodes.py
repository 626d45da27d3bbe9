"""The two nodes. Both take a model and give it back with settings on it; what acts on them is in `sampling`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy.model_sampling import CONST  # pyright: ignore[reportMissingImports]
from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]

from ddit.config import PatchSchedule, SkipSchedule

from .sampling import SETTINGS, WRAPPERS, FirstSteps, Settings

LARGEST = {"2x": 2, "4x": 4}


def with_settings(model: Any, patch_size: int | None = None, **changes: Any) -> Any:
    """A clone of the model with these settings, beside those of another DDiT node before it.

    Args:
        model: ComfyUI's ``ModelPatcher``.
        patch_size: Taken where the model does not tell its own.
        changes: Fields of `Settings`.

    Raises:
        ValueError: For a model that is no flow between pictures and noise, or whose patches are not square.
    """
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, CONST) or type(sampling).noise_scaling is not CONST.noise_scaling:
        raise ValueError(
            "DDiT needs a flow-matching model (FLUX, Wan, Qwen-Image, SD3 and their like), and this one is sampled in "
            "another way; connect it to the sampler without DDiT nodes"
        )
    if getattr(model.get_model_object("diffusion_model"), "time_r_in", None) is not None:
        raise ValueError(
            "this distilled model predicts a mean between two noise levels (MeanFlow), and has few steps to save; "
            "connect it to the sampler without DDiT nodes"
        )
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    before = options.get(SETTINGS, Settings())
    own = _own_patch_size(model, patch_size or before.patch_size)
    options[SETTINGS] = replace(before, patch_size=own, **changes)
    for kind, wrapper in WRAPPERS.items():
        patched.remove_wrappers_with_key(kind, SETTINGS)
        patched.add_wrapper_with_key(kind, SETTINGS, wrapper)
    return patched


def _own_patch_size(model: Any, otherwise: int) -> int:
    diffusion = model.get_model_object("diffusion_model")
    size = getattr(getattr(diffusion, "patchifier", diffusion), "patch_size", otherwise)  # LTX has the first
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    if height != width:
        raise ValueError(f"DDiT needs square patches, and this model's are {height} x {width}; leave DDiT nodes out")
    return height


def _share(name: str, default: float, step: float, tooltip: str) -> Any:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=step, tooltip=tooltip)


class DDiTPatches(io.ComfyNode):
    """Larger patches in the steps that allow it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        rule_or_share = "rule: the latents decide in each step. fixed: the first steps, as many as share says."
        untold = "The model's own patch size in latent pixels, where the model does not tell."
        return io.Schema(
            node_id="DDiTPatches",
            display_name="DDiT patches",
            category="advanced/model",
            description="Some steps see the picture in larger patches, hence fewer tokens. Any flow-matching model.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("schedule", options=["rule", "fixed"], default="rule", tooltip=rule_or_share),
                io.Combo.Input("largest", options=[*LARGEST], default="4x", tooltip="Largest patches, times its own."),
                _share("threshold", 0.001, 0.0001, "rule: tau. Higher is faster; 0 keeps every step full."),
                _share("percentile", 0.4, 0.05, "rule: rho, the share of patches that must lie below tau."),
                io.Boolean.Input("careful", default=True, tooltip="rule: only while what is dropped is mostly noise."),
                _share("share", 0.3, 0.05, "fixed: share of the steps, from the first on; 0 is off."),
                io.Int.Input("patch_size", default=2, min=1, max=32, optional=True, tooltip=untold),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        schedule: str,
        largest: str,
        threshold: float,
        percentile: float,
        careful: bool,
        share: float,
        patch_size: int = 2,
    ) -> io.NodeOutput:
        scale = LARGEST[largest]
        patches = FirstSteps(scale, share)
        if schedule == "rule":
            scales = tuple(s for s in (1, 2, 4) if s <= scale)
            patches = PatchSchedule(threshold=threshold, percentile=percentile, scales=scales, careful=careful)
        return io.NodeOutput(with_settings(model, patch_size, patches=patches))


class DDiTSkip(io.ComfyNode):
    """Steps in which the model is not called."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        plan_or_rule = "speedup: a plan for so many calls. threshold: the latents decide in each step."
        times = "Times fewer calls of the model; 1 is off."
        return io.Schema(
            node_id="DDiTSkip",
            display_name="DDiT skip",
            category="advanced/model",
            description="In some steps the model is not called: its answer is forecast. Any flow-matching model.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("by", options=["speedup", "threshold"], default="speedup", tooltip=plan_or_rule),
                io.Float.Input("speedup", default=2.0, min=1.0, max=20.0, step=0.1, tooltip=times),
                _share("threshold", 0.006, 0.001, "Skip while forecasts should be off by less than this; 0 is off."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, by: str, speedup: float, threshold: float) -> io.NodeOutput:
        skip = SkipSchedule(speedup=speedup) if by == "speedup" else SkipSchedule(threshold=threshold)
        return io.NodeOutput(with_settings(model, skip=skip))


class DDiTExtension(ComfyExtension):
    """Tells ComfyUI which nodes there are."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DDiTPatches, DDiTSkip]


async def comfy_entrypoint() -> DDiTExtension:
    """Where ComfyUI enters."""
    return DDiTExtension()
