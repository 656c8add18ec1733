"""Convert a tokenizer to llama.cpp's form: words, merges or scores, special tokens, and the chat template."""

import json
from pathlib import Path
from typing import Any

import gguf

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import ModelHeader

_TYPE = gguf.TokenType
#: (a part that only this pattern has, llama.cpp's name). A byte-level tokenizer splits text by a pattern before it merges tokens. llama.cpp
#: has a separate piece of code for each pattern.
_SPLITS = (
    (r"\p{Lu}\p{Lt}", "gpt-4o"),
    (r"\p{N}{1,3}", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
)


def add_vocabulary(writer: gguf.GGUFWriter, model_dir: Path, header: ModelHeader) -> None:
    """Write the tokenizer into the file's metadata. Raises NightpressError(unsupported_architecture) if llama.cpp has no such tokenizer."""
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        raise _unknown("it has no tokenizer.json")
    raw = json.loads(file.read_bytes())
    model, size = raw["model"], int(header.config["vocab_size"])
    words, kinds = _words(raw, size)
    if model["type"] == "WordPiece":
        writer.add_tokenizer_model("bert")
        for key, value in _normalizing(raw).items():
            writer.add_bool(f"tokenizer.ggml.normalizer.{key}", value)
        words = [_phantom(word, kind) for word, kind in zip(words, kinds, strict=True)]
    elif model["type"] == "BPE" and model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks = {_joined(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
        # llama.cpp merges the highest score first: the merge that was learnt first. Words that no merge makes get the lowest score.
        writer.add_token_scores([-float(ranks.get(word, len(ranks))) for word in words])
        writer.add_add_space_prefix(_adds_space(raw))
    elif _is_byte_level(model):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(raw))
    else:
        raise _unknown(f"a {model['type']} model")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    _add_special(writer, model_dir, raw, header)


def _words(raw: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The word and the kind of each token id. Ids without a word get a placeholder, since the embedding table has a row for them."""
    model = raw["model"]
    words = [f"[PAD{at}]" for at in range(size)]
    kinds = [int(_TYPE.UNUSED)] * size
    for word, at in model["vocab"].items():
        words[at], kinds[at] = word, int(_TYPE.NORMAL)
        if model.get("byte_fallback") and len(word) == 6 and word.startswith("<0x"):
            kinds[at] = int(_TYPE.BYTE)
    for row in raw.get("added_tokens") or ():
        words[row["id"]] = row["content"]
        kinds[row["id"]] = int(_TYPE.CONTROL if row["special"] else _TYPE.USER_DEFINED)
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        kinds[model["vocab"][unknown]] = int(_TYPE.UNKNOWN)
    return words, kinds


def _normalizing(raw: dict[str, Any]) -> dict[str, bool]:
    """The normalizer's settings for case and accents. All other steps must be BERT's, since llama.cpp has no others."""
    steps = raw.get("normalizer") or {}
    splits = (raw.get("pre_tokenizer") or {}).get("type")
    if steps.get("type") != "BertNormalizer" or splits != "BertPreTokenizer":
        raise _unknown(f"WordPiece behind {steps.get('type')} and {splits}")
    for key in ("clean_text", "handle_chinese_chars"):
        if not steps.get(key, True):
            raise _unknown(f"WordPiece with {key} false")
    lowercase = bool(steps.get("lowercase", True))
    accents = steps.get("strip_accents")
    return {"lowercase": lowercase, "strip_accents": lowercase if accents is None else bool(accents)}


def _phantom(word: str, kind: int) -> str:
    """Convert a word's mark: WordPiece marks the continuation of a word (`##`), llama.cpp marks its beginning (`▁`)."""
    if kind != _TYPE.NORMAL:
        return word
    return word[2:] if word.startswith("##") else "▁" + word


def _joined(merge: list[str] | str) -> str:
    return "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)


def _adds_space(raw: dict[str, Any]) -> bool:
    steps = json.dumps([raw.get("normalizer"), raw.get("pre_tokenizer")])
    return '"Prepend"' in steps or '"prepend_scheme": "always"' in steps or '"prepend_scheme": "first"' in steps


def _splitting(raw: dict[str, Any]) -> str:
    before = raw.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    patterns = [str((step.get("pattern") or {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    for pattern in patterns:
        found = next((name for mark, name in _SPLITS if mark in pattern), None)
        if found is None:
            raise _unknown(f"text split by {pattern[:80]!r}")
        return found
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    raise _unknown(f"text split by {' and '.join(str(kind) for kind in kinds)}")


def _add_special(writer: gguf.GGUFWriter, model_dir: Path, raw: dict[str, Any], header: ModelHeader) -> None:
    """Write special tokens, merges and chat templates, as the package `gguf` reads them for llama.cpp's converter.

    `bos` and `eos` are said in any case. Without them llama.cpp goes by the kind of tokenizer, and adds `bos` where the model has none.
    """
    special = gguf.SpecialVocab(
        model_dir, load_merges=_is_byte_level(raw["model"]), n_vocab=int(header.config["vocab_size"])
    )
    settings = _read(model_dir / "tokenizer_config.json")
    identifiers = {row["content"]: row["id"] for row in raw.get("added_tokens") or ()} | dict(raw["model"]["vocab"])
    for kind in special.special_token_types:  # the package looks among the added tokens alone
        if kind not in special.special_token_ids and (word := _content(settings.get(f"{kind}_token"))) in identifiers:
            special.special_token_ids[kind] = identifiers[word]
    if header.is_decoder:
        begins = _content(settings.get("bos_token"))
        around = json.dumps(raw.get("post_processor") or {})
        special.add_special_token |= {
            "bos": bool(begins) and json.dumps(begins) in around,
            "eos": bool(settings.get("add_eos_token")),
        }
    elif "cls" in special.special_token_ids:  # llama.cpp's encoders begin a text with `bos`
        special.special_token_ids["bos"] = special.special_token_ids.pop("cls")
    special.add_to_gguf(writer, quiet=True)


def _content(token: object) -> str | None:
    """The text of a token in tokenizer_config.json, where it may have settings beside it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_byte_level(model: dict[str, Any]) -> bool:
    return model["type"] == "BPE" and not model.get("byte_fallback")


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return found


def _unknown(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"llama.cpp has no tokenizer like this model's: {what}.",
        hint="Leave gguf out of `exports`; onnx and openvino carry the tokenizer as it is.",
    )
