"""Sound of audio pipelines: WAV files, and likeness."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np

from ddit.util.files import replacing


def sample_rate(pipe: Any) -> int | None:
    """Samples in a second of what a pipeline makes; ``None`` of pictures and clips."""
    return getattr(pipe, "sample_rate", None)


def refuse_sound(pipe: Any) -> None:
    """For commands that judge pictures and clips.

    Raises:
        ValueError: For a pipeline of sound.
    """
    if sample_rate(pipe) is not None:
        raise ValueError(
            f"{type(pipe).__name__} makes sound, which nothing here can judge; use ddit generate --compare"
        )


def save(path: Path, dynamic: np.ndarray, plain: np.ndarray | None = None, *, rate: int) -> list[Path]:
    """Write a WAV of 16 bits per sound; that of a plain run lies beside it as ``-plain.wav``.

    Args:
        path: Numbered where there are several.
        dynamic: ``[N, channels, T]`` in [-1, 1].
        plain: Of the same shape.
        rate: Samples in a second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = names(path, len(dynamic), compared=plain is not None)
    made = dynamic if plain is None else np.concatenate([dynamic, plain])
    for target, sound in zip(targets, made, strict=True):
        with replacing(target) as partial, wave.open(str(partial), "wb") as file:
            file.setnchannels(len(sound))
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(sixteen_bits(sound).T.tobytes())
    return targets


def names(path: Path, count: int, *, compared: bool) -> list[Path]:
    """Files of so many sounds, those of plain runs behind."""
    paths = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)] if count > 1 else [path]
    return [*paths, *(p.with_stem(f"{p.stem}-plain") for p in paths if compared)]


def sixteen_bits(sound: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] as files hold them, little-endian."""
    return (sound.clip(-1, 1) * 32767).round().astype("<i2")


def likeness(plain: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """``snr``: power of plain sounds to that of the difference in dB, as files hold them; infinite where equal."""
    a, b = (sixteen_bits(sound).astype(float) for sound in (plain, other))
    error = np.square(a - b).mean()
    return {"snr": float("inf") if error == 0 else float(10 * np.log10(np.square(a).mean() / error))}
