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
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.labels import LabelError, slice_of
from nightpress.core.recipes.textfile import invalid

_MAX_PIXELS = 64 * 1024**2
_BILINEAR = 2  #: Pillow's number of the filter
_UNCUT = 384  #: pixels of the shorter side from which ConvNeXt scales and does not cut


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
    channels, height, width = image_shape(model_dir, header)
    settings = _settings(model_dir)
    if ref.startswith("builtin:"):
        pixels = _synthetic(samples, (height, width), channels, seed)
        return Images(_normalised(pixels, settings), (None,) * samples)
    rows = list(parquet_rows(ref, find_file(ref, file), ("image", "label", "slice")))
    if not rows or "image" not in rows[0]:
        raise invalid(ref, "it has no column `image`", "Bring a Parquet file with `image` (bytes) and perhaps `label`.")
    slices = [_slice(ref, at + 1, row.get("slice")) if sliced else None for at, row in enumerate(rows)]
    order = draw(slices, samples, seed)
    frame = _Frame.of(settings, height, width)
    pixels = np.stack([_decode(ref, int(at), rows[at]["image"], frame, channels) for at in order])
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


@dataclass(frozen=True)
class _Frame:
    """How an image of any size becomes one of the model's, as preprocessor_config.json says."""

    scaled: (
        tuple[int, int] | int
    )  #: height and width; one number: of the shorter side, so that the image keeps its form
    cut: tuple[int, int]  #: height and width of the middle that the model sees
    resample: int  #: Pillow's number of the filter

    @classmethod
    def of(cls, settings: dict[str, Any], height: int, width: int) -> "_Frame":
        size, share = _sides(settings.get("size")), settings.get("crop_pct")
        scaled: tuple[int, int] | int = height, width
        if isinstance(size, int) and share and size < _UNCUT:  # ConvNeXt: larger than the model's images, then cut
            scaled = max(height, width, int(size / float(share)))
        elif settings.get("do_center_crop") and size is not None:
            high, wide = (size, size) if isinstance(size, int) else size
            scaled = max(high, height, width) if isinstance(size, int) else (max(high, height), max(wide, width))
        return cls(scaled, (height, width), int(settings.get("resample") or _BILINEAR))

    def apply(self, image: Any) -> Any:
        """The image in the model's size."""
        from PIL import Image

        if isinstance(self.scaled, int):
            short = min(image.size)
            wide, high = (max(1, round(side * self.scaled / short)) for side in image.size)
        else:
            high, wide = self.scaled
        scaled = image.resize((wide, high), Image.Resampling(self.resample))
        height, width = self.cut
        left, top = (wide - width) // 2, (high - height) // 2
        return scaled.crop((left, top, left + width, top + height))


def image_shape(model_dir: Path, header: ModelHeader) -> tuple[int, int, int]:
    """The channels, height and width of the images that a model is given, as preprocessor_config.json says; else as config.json does."""
    channels, height, width = header.pixels
    settings = _settings(model_dir)
    said = _sides(settings.get("crop_size")) if settings.get("do_center_crop") else _sides(settings.get("size"))
    if isinstance(said, int):
        said = (said, said)
    return (channels, *said) if said is not None else (channels, height, width)


def _sides(said: Any) -> tuple[int, int] | int | None:
    """Height and width; one number: of the shorter side, or of both. None: the settings don't say."""
    if isinstance(said, int) and not isinstance(said, bool):
        return said
    if isinstance(said, dict) and isinstance(said.get("height"), int) and isinstance(said.get("width"), int):
        return said["height"], said["width"]
    return said["shortest_edge"] if isinstance(said, dict) and isinstance(said.get("shortest_edge"), int) else None


def _synthetic(count: int, size: tuple[int, int], channels: int, seed: int) -> NDArray[np.float32]:
    """[N, C, height, width] from 0 to 1: noise whose amplitude is proportional to 1 / frequency, as in photographs."""
    height, width = size
    noise = np.random.default_rng(seed).standard_normal((count, channels, height, width))
    across = np.fft.rfftfreq(width) * width
    down = np.fft.fftfreq(height) * height
    frequency = np.hypot(down[:, None], across[None, :])
    spectrum = np.fft.rfft2(noise) / np.maximum(frequency, 1)
    fields = np.fft.irfft2(spectrum, s=size)
    low, high = fields.min(axis=(2, 3), keepdims=True), fields.max(axis=(2, 3), keepdims=True)
    result: NDArray[np.float32] = ((fields - low) / np.maximum(high - low, 1e-9)).astype(np.float32)
    return result


def _decode(ref: str, number: int, raw: Any, frame: _Frame, channels: int) -> NDArray[np.float32]:
    """Decode one image and bring it to the model's size: [C, height, width], values from 0 to 1. `number`: its row, for error texts."""
    from PIL import Image, UnidentifiedImageError

    data = raw.get("bytes") if isinstance(raw, dict) else raw
    if not isinstance(data, bytes):
        raise invalid(ref, f"row {number + 1}: `image` holds no bytes", "Embed the images in the Parquet file.")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise invalid(ref, f"row {number + 1}: its image has more than 64 megapixels", "Scale it down.")
            mode = "L" if channels == 1 else "RGB"
            scaled = np.asarray(frame.apply(image.convert(mode)), np.float32) / 255
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
