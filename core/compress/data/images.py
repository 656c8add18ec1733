"""Images for vision models: from a Parquet file in the layout of the model hubs, or synthetic ones for a built-in data set."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.rows import find_file, parquet_rows
from nightpress.core.compress.data.slices import Slices, draw, slices_of
from nightpress.core.recipes.datafile import invalid
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.labels import LabelError, slice_of

_MAX_PIXELS = 64 * 1024**2


@dataclass(frozen=True)
class Images:
    pixels: NDArray[np.float32]  #: [N, channels, height, width], scaled and normalised for the model
    labels: tuple[int | str | None, ...]
    slices: Slices | None = None  #: of each image; None: the data has no slices, or they were not asked for


def read_images(
    ref: str, file: Path | None, model_dir: Path, header: ModelHeader, *, samples: int, seed: int, sliced: bool = False
) -> Images:
    """Draw images without replacement, scaled and normalised by preprocessor_config.json. Raises NightpressError(invalid_data).

    sliced: every value of the column `slice` gets an equal share of the images, as far as it has rows.

    A built-in data set has no images. Smooth random fields are used in their place, the same ones for the same seed. A measurement on them
    shows how close a pressed model is to its source. It does not show how well the model recognises images.
    """
    config = header.vision_config
    wanted = config.get("image_size") or 224
    size = int(wanted[0] if isinstance(wanted, list) else wanted)
    channels = int(config.get("num_channels") or 3)
    settings = _settings(model_dir)
    if ref.startswith("builtin:"):
        pixels = _synthetic(samples, size, channels, seed)
        return Images(_normalised(pixels, settings), (None,) * samples)
    rows = list(parquet_rows(ref, find_file(ref, file), ("image", "label", "slice")))
    if not rows or "image" not in rows[0]:
        raise invalid(ref, "it has no column `image`", "Bring a Parquet file with `image` (bytes) and perhaps `label`.")
    slices = [_slice(ref, at + 1, row.get("slice")) if sliced else None for at, row in enumerate(rows)]
    order = draw(slices, samples, seed)
    pixels = np.stack([_decode(ref, int(at), rows[at]["image"], size, channels) for at in order])
    return Images(
        _normalised(pixels, settings),
        tuple(rows[at].get("label") for at in order),
        slices_of(slices[at] for at in order),
    )


def _slice(ref: str, number: int, raw: object) -> str | None:
    try:
        return slice_of(raw)
    except LabelError as error:
        raise invalid(ref, f"row {number}: `slice` {error}", error.hint) from None


def _synthetic(count: int, size: int, channels: int, seed: int) -> NDArray[np.float32]:
    """[N, C, size, size] from 0 to 1: noise whose amplitude is proportional to 1 / frequency, as in photographs."""
    noise = np.random.default_rng(seed).standard_normal((count, channels, size, size))
    across = np.fft.rfftfreq(size) * size
    down = np.fft.fftfreq(size) * size
    frequency = np.hypot(down[:, None], across[None, :])
    spectrum = np.fft.rfft2(noise) / np.maximum(frequency, 1)
    fields = np.fft.irfft2(spectrum, s=(size, size))
    low, high = fields.min(axis=(2, 3), keepdims=True), fields.max(axis=(2, 3), keepdims=True)
    result: NDArray[np.float32] = ((fields - low) / np.maximum(high - low, 1e-9)).astype(np.float32)
    return result


def _decode(ref: str, number: int, raw: Any, size: int, channels: int) -> NDArray[np.float32]:
    """Decode and resize one image to [C, size, size], values from 0 to 1. `number`: its row, for error texts."""
    from PIL import Image, UnidentifiedImageError

    data = raw.get("bytes") if isinstance(raw, dict) else raw
    if not isinstance(data, bytes):
        raise invalid(ref, f"row {number + 1}: `image` holds no bytes", "Embed the images in the Parquet file.")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise invalid(ref, f"row {number + 1}: its image has more than 64 megapixels", "Scale it down.")
            mode = "L" if channels == 1 else "RGB"
            scaled = np.asarray(image.convert(mode).resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise invalid(ref, f"row {number + 1}: its image can't be read", "Use PNG, JPEG or WebP.") from error
    result: NDArray[np.float32] = (scaled[None] if channels == 1 else scaled.transpose(2, 0, 1)).astype(np.float32)
    return result


def normalisation(model_dir: Path) -> tuple[list[float], list[float]]:
    """The mean and the standard deviation of each colour, from 0 to 1, by which a model's pixels are normalised."""
    settings = _settings(model_dir)
    if settings.get("do_normalize") is False:
        return [0.0] * 3, [1.0] * 3
    mean, deviation = (np.resize(settings.get(name) or 0.5, 3).tolist() for name in ("image_mean", "image_std"))
    return mean, deviation


def _settings(model_dir: Path) -> dict[str, Any]:
    file = model_dir / "preprocessor_config.json"
    raw = json.loads(file.read_bytes()) if file.is_file() else {}
    return raw if isinstance(raw, dict) else {}


def _normalised(pixels: NDArray[np.float32], settings: dict[str, Any]) -> NDArray[np.float32]:
    if settings.get("do_normalize") is False:
        return pixels
    channels = pixels.shape[1]
    mean, deviation = (
        np.resize(np.asarray(settings.get(name) or 0.5, np.float32), channels).reshape(1, -1, 1, 1)
        for name in ("image_mean", "image_std")
    )
    result: NDArray[np.float32] = ((pixels - mean) / deviation).astype(np.float32)
    return result
