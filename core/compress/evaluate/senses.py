"""The examples of models that see or hear: images and sounds with what is asked of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.decoder_text import first_tokens
from nightpress.core.compress.data.images import read_images
from nightpress.core.compress.data.sounds import read_sounds
from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.compress.evaluate import fidelity, labels
from nightpress.core.compress.evaluate.language import Generation
from nightpress.core.compress.evaluate.view import Evaluation, Scorer
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Quality, Recipe

#: The examples of the verification, the evaluations, and one image or sound that is timed.
Prepared = tuple[TokenSet, list[Evaluation], NDArray[np.float32]]


def images(
    recipe: Recipe,
    header: ModelHeader,
    model_dir: Path,
    data_files: dict[str, Path],
    rows: int,
    _steps: int,
    seed: int,
) -> Prepared:
    """rows: the number of images in the verification."""
    kind = "logits" if header.task == "classification" else "pooled"
    check = read_images("builtin:images", None, model_dir, header, samples=rows, seed=seed)
    evaluations = []
    for at, wanted in enumerate(entry for entry in recipe.evaluate if isinstance(entry, Quality)):
        read = read_images(
            wanted.data,
            data_files.get(wanted.data),
            model_dir,
            header,
            samples=wanted.samples,
            seed=seed + 1 + recipe.seed,
            sliced=True,
        )
        seen = replace(_whole(read.pixels), slices=read.slices)
        labelled = kind == "logits" and header.head == "classes" and all(label is not None for label in read.labels)
        scorer: Scorer
        if wanted.metric == "accuracy" or (wanted.metric == "auto" and labelled):
            classes = np.asarray([tokenized.class_index(label, header, wanted.data) for label in read.labels], np.int64)
            examples = TokenSet(f"quality{at}", kind, replace(seen, labels=classes))
            scorer = labels.Classification(examples, fidelity.output_names(header))
        else:
            scorer = fidelity.of_classifier(TokenSet(f"quality{at}", kind, seen), header)
        evaluations.append(Evaluation(wanted.data, scorer))
    return TokenSet("check", kind, _whole(check.pixels)), evaluations, check.pixels[0]


def sounds(
    recipe: Recipe,
    header: ModelHeader,
    model_dir: Path,
    data_files: dict[str, Path],
    rows: int,
    steps: int,
    seed: int,
) -> Prepared:
    """rows: the number of sounds in the verification, in each of which `steps` tokens are written.

    For `fidelity`, the decoder reads what is spoken if the data says it, else prose: both models are told the same.
    """
    prefix = list(first_tokens(model_dir, header))
    tokenizer = tokenized.open_tokenizer(model_dir)
    prose = [
        row.text for row in tokenized.read_rows("builtin:prose", None, purpose="calibration") if len(row.text) > 200
    ]

    def told(features: NDArray[np.float32], texts: tuple[str | None, ...], length: int) -> Sequences:
        tokens = [
            [*prefix, *tokenizer.encode(text or prose[at % len(prose)], special=False)][:length]
            for at, text in enumerate(texts)
        ]
        padded = tokenized.pad(tokens, tokenizer.pad_id)
        targets = np.where(padded.mask > 0, 0, -1)
        return replace(_whole(features), decoder=padded.ids, targets=targets)

    check = read_sounds("builtin:sounds", None, model_dir, header, samples=rows, seed=seed)
    verified = told(check.features, check.texts, len(prefix) + steps)
    evaluations = []
    for at, wanted in enumerate(entry for entry in recipe.evaluate if isinstance(entry, Quality)):
        name, file = f"quality{at}", data_files.get(wanted.data)
        heard = read_sounds(wanted.data, file, model_dir, header, samples=wanted.samples, seed=seed + 1 + recipe.seed)
        scorer: Scorer
        if wanted.metric == "generation":
            first: NDArray[Any] = np.tile(np.asarray(prefix, np.int64), (len(heard.texts), 1))
            examples = replace(_whole(heard.features), decoder=first)
            scorer = Generation(TokenSet(name, "generated", examples, new_tokens=wanted.new_tokens))
        else:
            length = min(wanted.length, header.positions or wanted.length)
            scorer = fidelity.Fidelity(
                fidelity.token_set(name, told(heard.features, heard.texts, length), header.vocabulary or 1)
            )
        evaluations.append(Evaluation(wanted.data, scorer))
    return TokenSet("check", "steps", replace(verified, targets=None)), evaluations, check.features[0]


def _whole(values: NDArray[np.float32]) -> Sequences:
    """Images or sounds as examples: each is a whole, without padding."""
    return Sequences(values, np.ones((len(values), 1), np.int64))
