"""Calibration samples for a pass: texts for language models, images for vision models, sounds for speech models."""

from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.calibration.mixture import from_another, mixed_windows
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.images import read_images
from nightpress.core.compress.data.pairs import has_pairs, pair_rows
from nightpress.core.compress.data.sounds import read_sounds
from nightpress.core.compress.data.tokenized import DataSource, open_tokenizer, text_rows, text_windows
from nightpress.core.recipes.calibration import MIXTURE, PROSE
from nightpress.core.recipes.header import ModelHeader


def calibration_samples(source: Path, context: PassContext) -> dict[str, Tensor]:
    """The model's inputs by argument name, each [samples, …], from the recipe's calibration data. Raises NightpressError(invalid_data).

    A classifier gets pairs of texts where the data has such, and a cross-encoder also from prose. A pair is a sample of its own.
    """
    wanted, header = context.calibration, context.header
    file = context.data_files.get(wanted.data)
    if header.sees_images:
        images = read_images(wanted.data, file, source, header, samples=wanted.samples, seed=wanted.seed)
        return {"pixel_values": torch.from_numpy(images.pixels)}
    if header.hears:
        sounds = read_sounds(wanted.data, file, source, header, samples=wanted.samples, seed=wanted.seed)
        return {"input_features": torch.from_numpy(sounds.features)}
    if wanted.data == MIXTURE and header.task == "causal-lm":
        return model_inputs(torch.from_numpy(mixed_windows(source, context)), header)
    ref = PROSE if wanted.data == MIXTURE else wanted.data
    data = DataSource(ref, file, source, purpose="calibration")
    paired = header.task == "classification" and (has_pairs(data) or (header.scores_pairs and file is None))
    rows = pair_rows(data) if paired else data.rows()
    rows = from_another(rows, wanted.seed)
    tokenizer = open_tokenizer(source)
    length = min(wanted.length, header.positions or wanted.length)
    if wanted.packing and not paired:
        ids = text_windows(rows, tokenizer, samples=wanted.samples, length=length, ref=wanted.data).ids
        return model_inputs(torch.from_numpy(ids), header)
    padded = text_rows(rows, tokenizer, header, samples=wanted.samples, length=length, seed=wanted.seed)
    inputs = model_inputs(torch.from_numpy(padded.ids), header, torch.from_numpy(padded.mask))
    return inputs if padded.types is None else inputs | {"token_type_ids": torch.from_numpy(padded.types)}


def model_inputs(ids: Tensor, header: ModelHeader, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The model's inputs for token ids [samples, length] int64 and their mask of the same shape.

    The decoder of an encoder-decoder gets the same text, shifted right by one token.
    """
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    if header.task != "seq2seq":
        return inputs
    start = int(header.config.get("decoder_start_token_id") or 0)
    shifted = torch.cat([torch.full((len(ids), 1), start), ids[:, :-1]], dim=1)
    if mask is not None:
        inputs["decoder_attention_mask"] = mask
    return inputs | {"decoder_input_ids": shifted}
