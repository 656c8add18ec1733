"""Cuts tokens from a tokenizer.json, so that text which needs none of them is tokenized as before.

Why that holds: WordPiece takes the longest piece that it knows, and the longest is kept. Unigram takes the best path, and only others go.
BPE merges by rank; every merge on the way to a kept token is kept, and at each step the best merge of the whole list is the best that is left.
"""

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError

State = dict[str, Any]  #: a parsed tokenizer.json
_MOST = 1024  #: texts that are tokenized at a time


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """How often each token occurs in the texts. tokenizer: of the library `tokenizers`, without truncation and padding."""
    found: Counter[int] = Counter()
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == _MOST:
            found.update(at for encoded in tokenizer.encode_batch(held) for at in encoded.ids)
            held = []
    found.update(at for encoded in tokenizer.encode_batch(held) for at in encoded.ids)
    return found


def vocabulary_of(state: State) -> dict[str, int]:
    """Token → id, of the model and of the added tokens. Raises NightpressError(invalid_recipe) for an unknown kind of tokenizer."""
    model = state["model"]
    if model["type"] == "Unigram":
        words = {token: at for at, (token, _) in enumerate(model["vocab"])}
    elif model["type"] in {"BPE", "WordPiece", "WordLevel"}:
        words = dict(model["vocab"])
    else:
        raise _unusable(f"its tokenizer is of the kind {str(model['type'])[:40]}")
    return words | {token["content"]: token["id"] for token in state["added_tokens"]}


def tokens_to_keep(
    state: State, counts: Mapping[int, int], needed: Collection[int], *, least: int, characters: bool
) -> list[int]:
    """The ids that stay, in ascending order: frequent tokens and what leads to them, added tokens, bytes, characters, and `needed` ids."""
    words, model = vocabulary_of(state), state["model"]
    names = {at: token for token, at in words.items()}
    kept = {at for at, count in counts.items() if count >= least} | set(needed)
    kept |= {token["id"] for token in state["added_tokens"]}
    kept |= {words[name] for name in (model.get("unk_token"),) if name in words}
    prefix = str(model.get("continuing_subword_prefix") or "")
    kept |= {
        at
        for token, at in words.items()
        if _is_byte(token) or (len(_bare(token, prefix)) == 1 and (characters or _is_alphabet(state)))
    }
    if model["type"] == "Unigram":
        kept |= {words[name] for name in ("▁",) if name in words}
        if isinstance(model.get("unk_id"), int):
            kept.add(model["unk_id"])
        # Unknown characters cost a little more than the rarest token: their cost stays the same.
        kept.add(min(range(len(model["vocab"])), key=lambda at: model["vocab"][at][1]))
    if model["type"] == "BPE":
        kept |= _on_the_way({names[at] for at in kept if at in names}, model, words)
    return sorted(at for at in kept if at in names)


def cut_tokenizer(state: State, kept: Sequence[int]) -> State:
    """The tokenizer with only these tokens, numbered from 0 in their order."""
    number = {before: after for after, before in enumerate(kept)}
    found = copy.deepcopy(state)
    model = found["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for at, entry in enumerate(model["vocab"]) if at in number]
        if isinstance(model.get("unk_id"), int):
            model["unk_id"] = number[model["unk_id"]]
    else:
        model["vocab"] = {token: number[at] for token, at in model["vocab"].items() if at in number}
    if model["type"] == "BPE":
        vocab = model["vocab"]
        model["merges"] = [
            merge for merge in model["merges"] if all(part in vocab for part in (*_pair(merge), "".join(_pair(merge))))
        ]
    for token in found["added_tokens"]:
        token["id"] = number[token["id"]]
    _renumber_processor(found.get("post_processor"), number)
    if found.get("padding"):
        found["padding"]["pad_id"] = number.get(found["padding"]["pad_id"], 0)
    return found


def _is_alphabet(state: State) -> bool:
    """Whether the tokens of one character stand for bytes, so that a tokenizer without one of them could not write every text."""
    return "ByteLevel" in str([state.get("pre_tokenizer"), state.get("decoder")])


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _bare(token: str, prefix: str) -> str:
    return token.removeprefix(prefix) if prefix else token


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, which older files write as one text."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _on_the_way(tokens: Collection[str], model: State, words: Mapping[str, int]) -> set[int]:
    """The ids of all pieces that BPE merges on its way from single characters to these tokens."""
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    found: set[int] = set()
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(range(len(pairs)), key=lambda at: ranks.get(pairs[at], len(ranks)))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = ["".join(pairs[best])]
            found.update(words[piece] for piece in (*pairs[best], parts[best]) if piece in words)
    return found


def _renumber_processor(processor: Any, number: Mapping[int, int]) -> None:
    """Renumber the special tokens that a post-processor puts around texts."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or ():
        _renumber_processor(inner, number)
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name][1] = number[processor[name][1]]
    special = processor.get("special_tokens")
    for entry in special.values() if isinstance(special, dict) else ():
        entry["ids"] = [number[at] for at in entry["ids"]]


def _unusable(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_RECIPE, f"`vocabulary` can't take this model: {what}.", hint="Leave the pass out."
    )
