"""What each class of transformers answers, from a table of transformers' own mappings. No torch and no transformers here.

`core/compress/model/transformers_classes.py` writes the table, and a test compares it with the installed transformers.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

Task = Literal["causal-lm", "classification", "token-classification", "masked-lm", "embedding", "seq2seq", "other"]
Senses = Literal["text", "images", "sound"]

TABLE = Path(__file__).with_name("transformers_classes.json")


class Kind(NamedTuple):
    """What a class answers, what it reads, and the class of transformers that loads it by its config."""

    task: Task
    senses: Senses
    loader: str


#: Classes that answer how well a text describes an image, such as CLIPModel.
_PAIRED = "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION"
#: Mapping of transformers → the kind of its classes. A class in several mappings has the kind of the first.
MAPPINGS: Mapping[str, Kind] = {
    "MODEL_FOR_SPEECH_SEQ_2_SEQ": Kind("seq2seq", "sound", "AutoModelForSpeechSeq2Seq"),
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM": Kind("seq2seq", "text", "AutoModelForSeq2SeqLM"),
    "MODEL_FOR_CAUSAL_LM": Kind("causal-lm", "text", "AutoModelForCausalLM"),
    # A model that sees images as well is pressed and measured as the language model that it is without them.
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT": Kind("causal-lm", "text", "AutoModelForImageTextToText"),
    "MODEL_FOR_MASKED_LM": Kind("masked-lm", "text", "AutoModelForMaskedLM"),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION": Kind("classification", "text", "AutoModelForSequenceClassification"),
    "MODEL_FOR_TOKEN_CLASSIFICATION": Kind("token-classification", "text", "AutoModelForTokenClassification"),
    "MODEL_FOR_IMAGE_CLASSIFICATION": Kind("classification", "images", "AutoModelForImageClassification"),
    "MODEL_FOR_AUDIO_CLASSIFICATION": Kind("other", "sound", "AutoModelForAudioClassification"),
    "MODEL_FOR_CTC": Kind("other", "sound", "AutoModelForCTC"),
    _PAIRED: Kind("other", "images", "AutoModelForZeroShotImageClassification"),
    "MODEL_FOR_IMAGE": Kind("embedding", "images", "AutoModel"),
    "MODEL_FOR_TEXT_ENCODING": Kind("embedding", "text", "AutoModelForTextEncoding"),
    "MODEL": Kind("embedding", "text", "AutoModel"),
}

#: What a class of `MODEL` reads → its kind.
_READS: Mapping[str, Kind] = {
    "text": MAPPINGS["MODEL"],
    "images": Kind("embedding", "images", "AutoModel"),
    "sound": Kind("other", "sound", "AutoModel"),
    "other": Kind("other", "text", "AutoModel"),
}

#: XLM's class finds hidden words and keeps no keys and values; transformers has it among the language models, too.
_NOT_AS = frozenset({("MODEL_FOR_CAUSAL_LM", "XLMWithLMHeadModel")})

#: Types of models that hear, and whose sounds are made into what they hear: windows of a log-mel spectrogram.
_HEARD = frozenset({"whisper"})
#: Types of models that are given patches with their places. Images come whole here.
_SEES_PATCHES = frozenset({"siglip2"})
#: For classes that no mapping has: the end of the name → the task.
_SUFFIXES: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    ("ForSequenceClassification", "classification"),
    ("ForImageClassification", "classification"),
    ("ForTokenClassification", "token-classification"),
    ("ForMaskedLM", "masked-lm"),
    ("Model", "embedding"),
)


def kind_of(architecture: str, model_type: str) -> Kind:
    """Return the kind of a class. Its loader is the class itself if transformers' mappings lead to another class for this type of model."""
    for mapping, kind in MAPPINGS.items():
        if architecture in _classes(mapping) and (mapping, architecture) not in _NOT_AS:
            own = _table()[mapping].get(model_type) == architecture
            if mapping == "MODEL":
                kind = _READS[_table()["READS"].get(model_type, "text")]
            return kind if own else kind._replace(loader=architecture)
    tasks: list[Task] = [task for suffix, task in _SUFFIXES if architecture.endswith(suffix)]
    images = model_type in _table()["MODEL_FOR_IMAGE"] or model_type in _table()["MODEL_FOR_IMAGE_CLASSIFICATION"]
    return Kind(tasks[0] if tasks else "other", "images" if images else "text", architecture)


def why_not_measured(architecture: str, model_type: str) -> tuple[str, str] | None:
    """Return (why no artifact of a model of this class could be compared with it, what to do); None: it can be."""
    if not architecture:
        return "its config.json names no class in `architectures`", "Save it once with a current transformers."
    if not is_known(model_type) and not any(architecture in _classes(mapping) for mapping in MAPPINGS):
        return (
            "transformers has no model of this type, and nothing else here runs it",
            "Bring a model that transformers has built in.",
        )
    kind, table = kind_of(architecture, model_type), _table()
    if kind.senses == "sound" and (kind.task != "seq2seq" or model_type not in _HEARD):
        return (
            "it hears, and of such models only Whisper is measured here",
            "Press a Whisper, or a model that reads text or sees images.",
        )
    if kind.senses == "images" and model_type in _SEES_PATCHES:
        return (
            "it sees patches with their places, and images come whole here",
            "Bring a model that sees whole images, such as a SigLIP.",
        )
    if architecture in _classes(_PAIRED):
        return (
            "it compares images with texts, and nothing here measures that",
            "Save its part for images or its part for texts alone, e.g. as a CLIPVisionModel or a CLIPTextModel, and bring that.",
        )
    if kind.task == "other":
        return (
            "what it answers can't be measured here",
            "Bring it as a language model, a classifier, a token classifier or an embedder.",
        )
    headless = kind.loader == "AutoModel" or kind.task in {"classification", "token-classification"}
    if headless and model_type in table["MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"]:
        return (
            "an encoder-decoder is measured here by the text that it writes, or as its encoder alone",
            "Bring the whole model with the head ForConditionalGeneration, or its encoder alone.",
        )
    return None


def is_known(model_type: str) -> bool:
    """Return whether transformers has a model of this type."""
    return any(model_type in _table()[mapping] for mapping in MAPPINGS)


def reads_both_ways(model_type: str) -> bool:
    """Return whether models of this type are encoders: they are trained to find hidden words, or see images."""
    return model_type in _table()["MODEL_FOR_MASKED_LM"]


def reads_onwards(model_type: str) -> bool:
    """Return whether models of this type are decoders alone: each token sees the tokens before it."""
    table = _table()
    return (
        model_type in table["MODEL_FOR_CAUSAL_LM"]
        and model_type not in table["MODEL_FOR_MASKED_LM"]
        and model_type not in table["MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM"]
    )


def is_taken_apart(model_type: str, tensor: str) -> bool:
    """Return whether transformers divides, joins or turns this tensor of the files as it loads it."""
    return any(re.search(pattern, tensor) for pattern in _table().get("TAKEN_APART", {}).get(model_type, ()))


@cache
def _table() -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = json.loads(TABLE.read_bytes())
    del found["transformers"]
    return found


@cache
def _classes(mapping: str) -> frozenset[str]:
    return frozenset(_table()[mapping].values())
