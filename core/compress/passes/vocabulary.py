"""Cut tokens from the tokenizer and from the tables of a model, and renumber them everywhere."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.pairs import has_pairs, pair_rows
from nightpress.core.compress.data.tokenized import DataSource
from nightpress.core.compress.data.vocabulary import State, count_tokens, cut_tokenizer, tokens_to_keep, vocabulary_of
from nightpress.core.compress.executors.rewrite import Effect, Put
from nightpress.core.compress.executors.stream import sweep
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.compress.model.checkpoint import write_file, write_json
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.passes import Vocabulary
from nightpress.core.recipes.passes.shrink import reshaped
from nightpress.core.recipes.passes.vocabulary import vocabulary_tables

#: Files of other kinds of tokenizers. transformers reads tokenizer.json, and the others would still hold the cut tokens.
_OTHER_FILES = (
    *("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "unigram.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
)
_SHOWN = 20  #: tokens that prose misses most
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids", "sequence_bias")


@dataclass(frozen=True)
class KeepRows:
    """Keeps the rows of some tokens, [tokens, …]; of a bias [1, tokens] its columns."""

    info: TensorInfo
    kept: Tensor  #: int64, ascending
    row_step = 1

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        shape = (1, len(self.kept)) if self.info.shape[0] == 1 else (len(self.kept), *self.info.shape[1:])
        return (reshaped(self.info, shape),)

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        del workspace
        if self.info.shape[0] == 1:
            put(self.info.name, 0, rows[:, self.kept].contiguous())
            return Effect()
        start, end = torch.searchsorted(self.kept, torch.tensor([first_row, first_row + len(rows)])).tolist()
        if end > start:
            chosen = rows[self.kept[start:end] - first_row].contiguous()
            put(self.info.name, start * chosen[0].nbytes, chosen)
        return Effect()


@folder_pass(Vocabulary)
def vocabulary(source: Path, target: Path, options: Vocabulary, context: PassContext) -> PassRecord:
    """Write the model with fewer tokens. All text of the data set is tokenized again, and must give the same tokens.

    Raises NightpressError: invalid_recipe for a model without tokenizer.json, invalid_data, and internal if a text is tokenized otherwise.
    """
    start = time.monotonic()
    state = _read_tokenizer(source)
    before = _library(state)
    texts = list(_texts(source, options, context))
    counts = count_tokens(before, texts)
    configs = {name: json.loads((source / name).read_bytes()) for name in _configs(source)}
    needed = {at for config in configs.values() for at in _token_ids(config)}
    kept = tokens_to_keep(state, counts, needed, least=options.least, characters=options.characters)
    rows = int(context.header.vocabulary or 0)
    if kept[-1] >= rows:
        raise _unusable(f"its tokenizer has the token {kept[-1]}, and its embeddings {rows} rows")
    cut = cut_tokenizer(state, kept)
    after = _library(cut)
    if options.least == 1:
        _check_the_same(before, after, kept, texts)
    tables = {tensor.name for tensor in vocabulary_tables(context.header)}
    chosen = torch.tensor(kept)

    def choose(info: TensorInfo) -> KeepRows | None:
        return KeepRows(info, chosen) if info.name in tables else None

    sweep(
        source,
        target,
        choose,
        context,
        recipe=f"{options.model_dump_json()} {hashlib.sha256(json.dumps(kept).encode()).hexdigest()}",
    )
    copy_companions(source, target)
    _write_files(target, cut, configs, {old: new for new, old in enumerate(kept)})
    summary = {
        "tokens": len(vocabulary_of(state)),
        "kept": len(kept),
        "rows_before": rows,
        "text_tokens": sum(counts.values()),
        "text_tokens_after": sum(count_tokens(after, texts).values()),
        **_prose(before, after, set(kept)),
    }
    return PassRecord(index=context.index, name=options.name, seconds=time.monotonic() - start, summary=summary)


def _texts(source: Path, options: Vocabulary, context: PassContext) -> Iterator[str]:
    data = DataSource(options.data, context.data_files.get(options.data), source)
    purposes = ("evaluation", "calibration") if options.data.startswith("builtin:") else ("evaluation",)
    for row in pair_rows(data) if has_pairs(data) else []:
        yield from (row.text, row.second or "")
    if not has_pairs(data):
        for purpose in purposes:
            part = DataSource(options.data, data.file, source, purpose=purpose)  # type: ignore[arg-type]
            yield from (row.text for row in part.rows())


def _read_tokenizer(source: Path) -> State:
    file = source / "tokenizer.json"
    if not file.is_file():
        raise _unusable("it has no tokenizer.json")
    state: State = json.loads(file.read_bytes())
    return state


def _library(state: State) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_the_same(before: Any, after: Any, kept: Sequence[int], texts: Sequence[str]) -> None:
    for text in texts:
        if before.encode(text).ids != [kept[at] for at in after.encode(text).ids]:
            raise NightpressError(
                ErrorCode.INTERNAL,
                f"Without the cut tokens, the text {text[:80]!r} is tokenized otherwise.",
                hint="Leave `vocabulary` out, and report this tokenizer.",
            )


def _prose(before: Any, after: Any, kept: set[int]) -> dict[str, Any]:
    """How much more finely built-in prose is split, and the tokens that it misses most."""
    texts = [row.text for row in DataSource("builtin:prose", None).rows()]
    whole, finer = count_tokens(before, texts), count_tokens(after, texts)
    missed = Counter({before.id_to_token(at): count for at, count in whole.items() if at not in kept})
    return {
        "prose_tokens": sum(whole.values()),
        "prose_tokens_after": sum(finer.values()),
        "split_in_prose": sum(missed.values()),
        "missed_most": dict(missed.most_common(_SHOWN)),
    }


def _configs(folder: Path) -> list[str]:
    return [name for name in ("config.json", "generation_config.json") if (folder / name).is_file()]


def _token_ids(config: Any) -> Iterator[int]:
    """The tokens that a config names, at every depth."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif _names_tokens(key):
            yield from _numbers(value)


def _names_tokens(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids")) or key in _ID_LISTS


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        yield value


def _write_files(target: Path, tokenizer: State, configs: Mapping[str, Any], number: Mapping[int, int]) -> None:
    for name in _OTHER_FILES:
        (target / name).unlink(missing_ok=True)
    write_file(target / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False).encode())
    for name, config in configs.items():
        write_json(target / name, _renumbered(config, number))
    file = target / "tokenizer_config.json"
    if file.is_file():
        settings = json.loads(file.read_bytes())
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            settings["added_tokens_decoder"] = {
                str(number[int(at)]): token for at, token in decoder.items() if int(at) in number
            }
            write_json(file, settings)


def _renumbered(config: dict[str, Any], number: Mapping[int, int]) -> dict[str, Any]:
    """A config with the new number of tokens and the new ids. Negative ids stand for no token, and stay."""

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new(entry) for entry in value]
        return number.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = _renumbered(value, number)
        elif key == "vocab_size":
            found[key] = len(number)
        else:
            found[key] = new(value) if _names_tokens(key) else value
    return found


def _unusable(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_RECIPE, f"`vocabulary` can't take this model: {what}.", hint="Leave the pass out."
    )
