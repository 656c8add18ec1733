"""Tokenizers as models have them: SentencePiece alone, without padding, with more tokens than the model has, or fewer."""

import json
from pathlib import Path

import pytest
from transformers.convert_slow_tokenizer import import_protobuf

from nightpress.core.compress.data.tokenized import Sequences, check_vocabulary, open_tokenizer, pad
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.every_family import save_family

_PIECES = ["▁the", "▁press", "▁", "t", "h", "e", "p", "r", "s", "he", "re", "ess", "th", "pr", "ss"]


def sentencepiece_alone(folder: Path) -> Path:
    """A Llama whose only tokenizer file is a tokenizer.model: pairs of bytes, with bytes for unknown letters."""
    save_family("llama", folder, vocab_size=320)
    (folder / "tokenizer.json").unlink()
    model = import_protobuf().ModelProto()
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces = [(text, 0.0, kind) for text, kind in special]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [(text, -float(at), 1) for at, text in enumerate(_PIECES)]
    for text, score, kind in pieces:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kind
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "add_bos_token": True}))
    return folder


def test_sentencepiece_alone_is_read(tmp_path: Path) -> None:
    folder = sentencepiece_alone(tmp_path / "model")
    assert inspect_model(FolderFiles(folder)).has_tokenizer
    tokenizer = open_tokenizer(folder)
    ids = tokenizer.encode("the é", special=True)
    assert ids[0] == 1
    assert ids[-2:] == [3 + 0xC3, 3 + 0xA9], "letters that no piece has are bytes"
    assert max(tokenizer.encode("the press", special=False)) >= 259, "the rest is pieces"
    assert tokenizer.encode_counted("the press")[1] is None


def test_a_tokenizer_without_padding_pads_where_nothing_is_read(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "model", pad_token_id=None)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {
        word.replace("[PAD]", "zero"): at for word, at in tokenizer["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    opened = open_tokenizer(folder)
    padded = pad([opened.encode("abc", special=True), opened.encode("a", special=True)], opened.pad_id)
    assert padded.ids.max() < 96
    assert padded.mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_tokens_beyond_the_table_are_told_and_a_table_beyond_the_tokenizer_is_fine(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "model")
    header = inspect_model(FolderFiles(folder))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    highest = max(tokenizer["model"]["vocab"].values())
    assert highest < header.config["vocab_size"] - 1, "the table has more rows than the tokenizer has tokens"
    _check(folder)
    tokenizer["added_tokens"] = [
        {"id": highest + 1 + at, "content": f"<extra{at}>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for at in range(header.config["vocab_size"])
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    _check(folder)
    with pytest.raises(NightpressError, match="has embeddings for 96 tokens only") as error:
        _check(folder, f"<extra{header.config['vocab_size'] - 1}>")
    assert error.value.code is ErrorCode.MALFORMED_MODEL


def _check(folder: Path, text: str = "abc") -> None:
    tokenizer = open_tokenizer(folder)
    sequences: Sequences = pad([tokenizer.encode(text, special=True)], tokenizer.pad_id)
    check_vocabulary(sequences, inspect_model(FolderFiles(folder)))
