"""Sounds for speech models: from a Parquet file in the layout of the model hubs, or synthetic ones for a built-in data set."""

import io
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data.rows import find_file, parquet_rows
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.textfile import invalid

_TEXTS = ("text", "sentence", "transcription")  #: columns that say what is spoken
_RATE = 16_000  #: samples a second that a speech model hears
_HOP = 160  #: samples between two frames of its spectrogram
_TOP = {1: 128, 2: 2**15, 4: 2**31}  #: bytes of a sample → the largest magnitude


@dataclass(frozen=True)
class Sounds:
    features: NDArray[np.float32]  #: [N, bands, frames], log-mel spectrograms
    texts: tuple[str | None, ...]  #: what is spoken


def read_sounds(
    ref: str, file: Path | None, model_dir: Path, header: ModelHeader, *, samples: int, seed: int
) -> Sounds:
    """Draw sounds without replacement, as log-mel spectrograms by preprocessor_config.json. Raises NightpressError(invalid_data).

    A built-in data set has no sounds. Glides of tones with noise are used in their place, the same ones for the same seed. A measurement on
    them shows how close a pressed model is to its source. It does not show how well the model understands speech.
    """
    _, frames = header.features
    if ref.startswith("builtin:"):
        waves = _synthetic(samples, frames * _HOP, seed)
        return Sounds(_features(waves, model_dir, header), (None,) * samples)
    rows = list(parquet_rows(ref, find_file(ref, file), ("audio", *_TEXTS)))
    if not rows or "audio" not in rows[0]:
        raise invalid(ref, "it has no column `audio`", "Bring a Parquet file with `audio` (bytes) and perhaps `text`.")
    order = np.random.default_rng(seed).permutation(len(rows))[:samples]
    waves = [_decode(ref, int(at), rows[at]["audio"]) for at in order]
    texts = tuple(next((rows[at][name] for name in _TEXTS if rows[at].get(name)), None) for at in order)
    return Sounds(_features(waves, model_dir, header), texts)


def _features(waves: list[NDArray[np.float32]], model_dir: Path, header: ModelHeader) -> NDArray[np.float32]:
    """[N, bands, frames]. A longer sound is cut, a shorter one padded with silence, as the model was trained."""
    from transformers import WhisperFeatureExtractor

    bands, frames = header.features
    said = (model_dir / "preprocessor_config.json").is_file()
    extractor = (
        WhisperFeatureExtractor.from_pretrained(model_dir, local_files_only=True)
        if said
        else WhisperFeatureExtractor(feature_size=bands)
    )
    found: NDArray[np.float32] = extractor(
        waves,
        sampling_rate=_RATE,
        padding="max_length",
        max_length=frames * _HOP,
        truncation=True,
        return_tensors="np",
    )["input_features"]
    return found.astype(np.float32)


def _synthetic(count: int, length: int, seed: int) -> list[NDArray[np.float32]]:
    """Sounds of `length` samples: three tones that glide between 100 and 4,000 Hz and swell, with some noise."""
    random, time = np.random.default_rng(seed), np.arange(length) / _RATE
    found = []
    for _ in range(count):
        sound = 0.02 * random.standard_normal(length)
        for _ in range(3):
            low, high = np.exp(random.uniform(np.log(100), np.log(4000), 2))
            phase = 2 * np.pi * np.cumsum(np.linspace(low, high, length)) / _RATE
            swell = 0.5 + 0.5 * np.sin(2 * np.pi * random.uniform(0.5, 4) * time + random.uniform(0, 6))
            sound += 0.2 * swell * np.sin(phase)
        found.append(sound.astype(np.float32))
    return found


def _decode(ref: str, number: int, raw: Any) -> NDArray[np.float32]:
    """A WAV file's samples at 16 kHz, its channels averaged, from −1 to 1. `number`: its row, for error texts."""
    data = raw.get("bytes") if isinstance(raw, dict) else raw
    if not isinstance(data, bytes):
        raise invalid(ref, f"row {number + 1}: `audio` holds no bytes", "Embed the sounds in the Parquet file.")
    try:
        with wave.open(io.BytesIO(data)) as sound:
            width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            values = np.frombuffer(sound.readframes(sound.getnframes()), {1: "u1", 2: "<i2", 4: "<i4"}[width])
    except (wave.Error, EOFError, KeyError, ValueError) as error:
        raise invalid(ref, f"row {number + 1}: its sound can't be read", "Use WAV with 8, 16 or 32 bits.") from error
    levels = (values.astype(np.float64) - (128 if width == 1 else 0)) / _TOP[width]
    mono = levels[: len(levels) // channels * channels].reshape(-1, channels).mean(axis=1)
    if not len(mono) or rate <= 0:
        raise invalid(ref, f"row {number + 1}: its sound is empty", "Leave the row out.")
    steps = np.arange(int(len(mono) * _RATE / rate)) * (rate / _RATE)
    result: NDArray[np.float32] = np.interp(steps, np.arange(len(mono)), mono).astype(np.float32)
    return result
