"""Pictures and clips on disk: PNG, and MP4 with a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ddit.util.files import replacing

LEAST_HEIGHT = 256
"""Of an MP4: smaller clips are enlarged by a whole factor, since video codecs halve the resolution of colours."""


def save(path: Path, dynamic: np.ndarray, plain: np.ndarray | None = None, *, fps: int = 16) -> list[Path]:
    """Write a PNG per picture or an MP4 per clip; with ``plain``, plain on the left and dynamic on the right.

    Beside a clip lies a contact sheet: its frames in a row, plain above dynamic.

    Args:
        path: Ends in .png or .mp4; numbered where there are several.
        dynamic: ``[N, H, W, 3]`` or ``[N, F, H, W, 3]`` in [0, 1].
        plain: Of the same shape.
        fps: Frames per second of a clip.

    Raises:
        ValueError: When clips can't be written for want of a package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = dynamic if plain is None else np.concatenate([plain, dynamic], axis=-2)
    paths = names(path, len(shown))
    for target, picture in zip(paths, shown, strict=True):
        if picture.ndim == 3:
            save_png(target, picture)
        else:
            _save_clip(target, picture, fps)
    if dynamic.ndim == 4:
        return paths
    sheets = [target.with_suffix(".png") for target in paths]
    for i, sheet in enumerate(sheets):
        rows = [np.concatenate(list(clips[i]), axis=1) for clips in (plain, dynamic) if clips is not None]
        save_png(sheet, np.concatenate(rows))
    return [*paths, *sheets]


def names(path: Path, count: int) -> list[Path]:
    """Files of so many pictures or clips: numbered where there are several."""
    return [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)] if count > 1 else [path]


def eight_bits(pictures: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as files hold them, uint8; such as are so already stay as they are."""
    return pictures if pictures.dtype == np.uint8 else (pictures * 255).round().astype(np.uint8)


def frames(pictures: np.ndarray) -> np.ndarray:
    """Clips ``[N, F, H, W, 3]`` as pictures ``[N F, H, W, 3]``; pictures stay as they are."""
    return pictures.reshape(-1, *pictures.shape[-3:])


def check_video_writer() -> None:
    """Refuse before anything is drawn.

    Raises:
        ValueError: When no MP4 can be written here.
    """
    try:
        import imageio_ffmpeg  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("clips need the packages imageio and imageio-ffmpeg: pip install 'ddit[video]'") from None


def save_png(path: Path, picture: np.ndarray) -> None:
    """One picture ``[H, W, 3]`` in [0, 1]."""
    from PIL import Image

    with replacing(path) as partial:
        Image.fromarray(eight_bits(picture)).save(partial, format="PNG")


def _save_clip(path: Path, clip: np.ndarray, fps: int) -> None:
    from diffusers.utils import export_to_video

    check_video_writer()
    factor = -(-LEAST_HEIGHT // clip.shape[1])
    large = clip.repeat(factor, axis=1).repeat(factor, axis=2)
    with replacing(path) as partial:
        named = partial.with_name(f"{partial.name}.mp4")  # the ending tells ffmpeg the format
        export_to_video(list(large), str(named), fps=fps, quality=8)
        named.replace(partial)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Likeness of two sets of pictures in [0, 1] in dB, as files hold them: infinite where they are equal."""
    error = np.square(eight_bits(a).astype(float) - eight_bits(b).astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def save_row(path: Path, pictures: Mapping[str, np.ndarray], side: int) -> None:
    """PNG: pictures ``[H, W, 3]`` in [0, 1] side by side, enlarged to ``side`` pixels, each under its name."""
    from PIL import Image, ImageDraw, ImageFont

    margin, head = side // 24, side // 10
    sheet = Image.new("RGB", (len(pictures) * (side + margin) + margin, side + head + margin), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=head * 0.6)
    for i, (name, picture) in enumerate(pictures.items()):
        left = margin + i * (side + margin)
        enlarged = Image.fromarray(eight_bits(picture)).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(enlarged, (left, head))
        pen.text((left + side / 2, head / 2), name, fill="black", font=font, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        sheet.save(file, format="PNG")
