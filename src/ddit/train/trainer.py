"""The training loop: seeded by step, so that a run killed at any moment continues to the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from diffusers import ModularPipeline
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from ddit.adapter import PatchAdapter
from ddit.models import architecture_for
from ddit.models.base import Architecture
from ddit.pipelines.generate import guidance_scale
from ddit.pipelines.loading import load_pipeline
from ddit.preset import Preset
from ddit.train import disk
from ddit.train.config import TrainConfig
from ddit.train.distill import Batch, Draw, draw, errors, groups, losses, make_batch, measured_detail, weights
from ddit.train.parts import (
    as_learnt,
    attention_backends,
    earlier_adapter,
    make_lr,
    make_optimizer,
    new_adapter,
    sum_over_processes,
)
from ddit.train.pictures import check_encodes
from ddit.train.samples import Samples, samples_of
from ddit.train.sources import Source, read_source
from ddit.train.validation import errors_of, save_pictures, validate
from ddit.util.extras import require
from ddit.util.files import add_lines, read_lines, replacing, replacing_folder, write_json
from ddit.util.progress import progress

PATIENCE = timedelta(hours=12)
"""For which processes wait for each other, while one draws or validates."""


def train(config: TrainConfig) -> Path:
    """Draw samples, train, validate; returns the folder of the result. Run again to continue.

    Raises:
        ValueError: When the run in ``config.out`` has other settings, or something it needs is missing or damaged.
        FloatingPointError: When the loss is no longer finite; the last checkpoint stays.
    """
    out = Path(config.out)
    source = _prepare(config, out)
    try:
        accelerator = Accelerator(
            cpu=config.cpu,
            mixed_precision=config.mixed_precision,
            log_with=config.tracker,
            project_dir=str(out),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise ValueError(
            "accelerate keeps mixed_precision and cpu as they were at first in this Python process; "
            "begin a new process for other ones"
        ) from error
    pipe, preset = load_pipeline(config.model, dtype=config.dtype, device=str(accelerator.device))
    if isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"{config.model} is a modular pipeline, whose latents do not come as the transformer gets them; "
            "train on an ordinary pipeline with the same transformer"
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"{config.model} has two transformers, and an adapter serves one; train on a pipeline with one, "
            "and let two work without an adapter"
        )
    if config.images is not None:
        check_encodes(pipe)
    if accelerator.is_main_process:
        write_json(out / disk.SETTINGS, config.to_dict())
    run = Run.begin(config, accelerator, pipe, preset, source)
    if config.tracker:
        accelerator.init_trackers(
            "ddit", config={k: v for k, v in config.to_dict().items() if not isinstance(v, list | dict)}
        )
    if run.step >= config.steps:
        accelerator.print(f"{config.out} has its {run.step} steps; ask for more with --steps")
    run.make_up()
    hidden = not accelerator.is_main_process
    backends = attention_backends(accelerator.device.type)
    with sdpa_kernel(backends), progress("train", config.steps, done=run.step, hidden=hidden) as advance:
        while run.step < config.steps:
            started = time.perf_counter()
            loss = run.advance()
            advance(loss=loss, steps_per_second=1 / (time.perf_counter() - started))
            if run.step % config.checkpoint_every == 0 or run.step == config.steps:
                run.save()
            if run.step % config.validate_every == 0 or run.step == config.steps:
                run.validate()
    accelerator.end_training()
    return disk.result_folder(config)


def _prepare(config: TrainConfig, out: Path) -> Source:
    """Check the run's settings against those it began with; returns what its samples are made of."""
    if config.optimizer == "prodigy":
        require("prodigyopt", "the optimizer Prodigy")
    disk.check_settings(config)
    trackers = [kind.value for kind in get_available_trackers()]
    if config.tracker is not None and config.tracker not in trackers:
        raise ValueError(
            f"tracker is {config.tracker!r}; installed here are {', '.join(trackers) or 'none'}: "
            "install its package, or leave --tracker out"
        )
    source = read_source(config)
    if len(source.prompts) <= config.validation:
        raise ValueError(
            f"{len(source.prompts)} samples are not more than validation={config.validation}; "
            "give more prompts or pictures (--count), or keep fewer apart (--validation)"
        )
    out.mkdir(parents=True, exist_ok=True)
    return source


@dataclass
class Run:
    """Everything that changes, and what it is made from."""

    config: TrainConfig
    accelerator: Accelerator
    pipe: Any
    architecture: Architecture
    samples: Samples
    adapter: PatchAdapter
    """What is trained."""
    attachment: Any
    """It on the transformer; has ``remove``."""
    variance: dict[int, Tensor]
    """Scale -> variance of the detail that pooling loses."""
    optimizer: torch.optim.Optimizer
    lr: Any
    ema: EMAModel | None
    guidance: float
    """Scale with which samples of two passes were drawn."""
    before: int = 0
    """Steps of the adapter that training goes on from."""
    step: int = 0

    @classmethod
    def begin(cls, config: TrainConfig, accelerator: Accelerator, pipe: Any, preset: Preset, source: Source) -> Run:
        """A run as the last checkpoint left it, or a new one."""
        transformer = pipe.transformer.requires_grad_(False).eval()
        earlier = earlier_adapter(transformer, config)  # what is refused is refused before samples are drawn
        config = as_learnt(config, earlier)
        samples = samples_of(config, accelerator, pipe, preset, source)
        if config.pictures == 0:
            for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
                if hasattr(pipe, name):
                    setattr(pipe, name, None)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        architecture = architecture_for(transformer)
        torch.manual_seed(config.seed)
        measured = measured_detail(samples, config.scales, architecture.patch_size)
        adapter: Any = new_adapter(transformer, config, detail_variance=measured, earlier=earlier)
        attachment = adapter.to(accelerator.device).attach(transformer)
        optimizer = make_optimizer(adapter, config)
        lr = make_lr(optimizer, config)
        ema = EMAModel(adapter.parameters(), decay=config.ema, use_ema_warmup=True) if config.ema else None
        variance = {s: torch.tensor(v, device=accelerator.device) for s, v in measured.items()}
        guidance = guidance_scale(pipe, samples.manifest["settings"])
        before = (earlier.config["steps_trained"] or 0) if earlier is not None else 0
        made = (adapter, attachment, variance, optimizer, lr, ema, guidance, before)
        run = cls(config, accelerator, pipe, architecture, samples, *made)
        run._restore()
        return run

    @property
    def runs(self) -> int:
        """Number of runs to train on; those behind are for validation."""
        return len(self.samples.prompts) - self.config.validation

    @property
    def trained(self) -> int:
        """Steps of the adapter, those before this run among them."""
        return self.before + self.step

    def advance(self) -> float:
        """One optimiser step; returns its loss, the mean over the global batch."""
        started = time.perf_counter()
        config, accelerator = self.config, self.accelerator
        total = config.batch * config.accumulation * accelerator.num_processes
        first = accelerator.process_index * config.batch * config.accumulation
        self.optimizer.zero_grad()
        loss = torch.zeros((), device=accelerator.device)
        for begin in range(first, first + config.batch * config.accumulation, config.batch):
            numbers = range(begin, begin + config.batch)
            loss += self._backward(numbers, total)
        sum_over_processes(accelerator, self.adapter, loss)
        value = loss.item()
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), config.clip or math.inf)
        if not (math.isfinite(value) and bool(torch.isfinite(norm))):
            raise FloatingPointError(
                f"the loss is {value} and its gradient {float(norm)} at step {self.step}; nothing was saved since the "
                f"last checkpoint. Lower lr ({config.learning_rate:g}) or use mixed_precision=bf16, and start anew"
            )
        self.optimizer.step()
        self.lr.step()
        if self.ema is not None:
            self.ema.step(self.adapter.parameters())
        self.step += 1
        self._log({"step": self.step, "loss": value, "seconds": round(time.perf_counter() - started, 4)})
        return value

    def load(self, draws: list[Draw]) -> list[Batch]:
        """See `make_batch`; one for each guidance pass, whose prompts may differ in length."""
        where = self.accelerator.device, self.pipe.transformer.dtype
        return [make_batch(self.architecture, self.samples, draws, n, *where) for n in range(self.samples.passes)]

    def losses(
        self, batches: Sequence[Batch], scale: int, rows: list[int], adapter: PatchAdapter | None
    ) -> tuple[Tensor, Tensor]:
        """See `distill.losses`."""
        told = self.pipe.transformer, self.architecture, self.adapter.coarse, adapter, self.variance
        with self.accelerator.autocast():
            off = [errors(*told, batch, scale, rows) for batch in batches]
        return losses(off, self.guidance)

    def _backward(self, numbers: Sequence[int], total: int) -> Tensor:
        """Gradients of this batch's part of the loss; scales one after another, to hold one graph at a time."""
        share = torch.zeros((), device=self.accelerator.device)
        batches = self.load([draw(self.config, self.samples, self.runs, self.step, n) for n in numbers])
        for scale, rows in groups(batches[0].scales).items():
            _, error = self.losses(batches, scale, rows, self.adapter)
            loss = (weights(self.config.weighting, batches[0].sigma[rows]) * error).sum() / total
            with self.adapter.low_rank_at(scale):
                loss.backward()
            share += loss.detach()
        return share

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The adapter's hooks are off inside the block, so that `ddit.apply` can put on its own."""
        self.attachment.remove()
        try:
            yield
        finally:
            self.attachment = self.adapter.attach(self.pipe.transformer)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights are in use inside the block."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.adapter.parameters())
        self.ema.copy_to(self.adapter.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.adapter.parameters())

    def validate(self) -> None:
        """Velocity errors and example pictures of the averaged weights."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        out = Path(self.config.out)
        with self.averaged():
            rows = validate(self)
        add_lines(out / "validation.jsonl", rows)
        if self.config.tracker:
            named = {f"error/scale{r['scale']}/sigma{r['sigma']:g}": r["error"] for r in rows}
            self.accelerator.log(named, step=self.step)
        self.adapter.register_to_config(errors=errors_of(rows))
        result = disk.result_folder(self.config)
        if disk.saved_step(result) == self.trained:
            self.adapter.save_config(result)
            disk.write_card(result, self.config, self.adapter)
        if self.config.pictures:
            (out / "pictures").mkdir(exist_ok=True)
            with self.averaged():
                save_pictures(self, out / "pictures" / f"step-{self.step:06d}.png")

    def save(self) -> None:
        """A checkpoint beside the earlier ones, then the result; what is replaced is deleted last."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        out = Path(self.config.out)
        state = {
            "step": self.step,
            "adapter": self.adapter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr": self.lr.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        try:
            with replacing(out / f"checkpoint-{self.step:06d}.pt") as path:
                torch.save(state, path)
            self.adapter.register_to_config(steps_trained=self.trained)
            with self.averaged(), replacing_folder(disk.result_folder(self.config)) as path:
                self.adapter.save_pretrained(path)
                disk.write_card(path, self.config, self.adapter)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"the checkpoint of step {self.step} can't be written to {out} ({error}); earlier ones are kept. "
                "Free some space and run the same command"
            ) from error
        for old in disk.checkpoints(out)[: -self.config.keep]:
            old.unlink()

    def make_up(self) -> None:
        """Make what a run lacks that was killed between its checkpoint and what comes after it."""
        out = Path(self.config.out)
        if self.accelerator.is_main_process:
            for name in ("train", "validation"):
                disk.keep_until(out / f"{name}.jsonl", self.step)
        self.accelerator.wait_for_everyone()
        if self.step == 0:
            return
        if disk.saved_step(disk.result_folder(self.config)) != self.trained:
            self.save()
        due = self.step % self.config.validate_every == 0 or self.step == self.config.steps
        if due and not any(row["step"] == self.step for row in read_lines(out / "validation.jsonl")):
            self.validate()

    def _restore(self) -> None:
        found = disk.checkpoints(Path(self.config.out))
        if not found:
            return
        state = disk.load_checkpoint(found[-1])
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr.load_state_dict(state["lr"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        self.step = state["step"]
        rows = disk.last_validation(Path(self.config.out), self.step)
        if rows:
            self.adapter.register_to_config(errors=errors_of(rows))

    def _log(self, figures: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            add_lines(Path(self.config.out) / "train.jsonl", [figures])
        if self.config.tracker:
            self.accelerator.log({k: v for k, v in figures.items() if k != "step"}, step=figures["step"])
