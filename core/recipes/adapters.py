"""Reads a PEFT adapter's config and headers, and finds what it does to each weight of its base model. No torch here.

LoRA (Hu et al., arXiv 2106.09685): W' = W + s · B · A. DoRA (Liu et al., arXiv 2402.09353): its rows are then scaled to stored magnitudes.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.filenames import ADAPTER_FILE, ADAPTER_WEIGHTS, is_model_file
from nightpress.core.recipes.header import TensorInfo
from nightpress.core.recipes.jsonfile import malformed

#: Folder of a model's files that holds the adapter to merge into them.
ADAPTER_DIR = "adapter"
#: Files of an adapter's folder that replace the base's: it was trained with them.
_TOKENIZER = re.compile(
    r"(tokenizer|vocab|added_tokens|special_tokens_map|tokenizer_config|chat_template|unigram)\.(json|txt|model|jinja)|merges\.txt|spiece\.model"
)
_PREFIX = "base_model.model."
#: Beginnings that change the base before training, so that the stored base is not the one to merge into.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Merge:
    """What an adapter does to a weight of the base."""

    kind: Literal["linear", "embedding", "replaced"]
    #: role → the adapter's tensor: a [r, in], b [out, r], magnitude [out]; new: to be used in place of the base's
    parts: Mapping[str, str]
    scale: float = 1.0
    transposed: bool = False  #: the base stores the weight as [in, out]


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its base."""

    merges: Mapping[str, Merge]  #: by the base's tensor
    grown: Mapping[
        str, tuple[int, ...]
    ]  #: the base's tables that the adapter replaces by ones with other numbers of rows → their shapes
    detail: str  #: e.g. "lora of rank 16 on 64 weights"


@dataclass(frozen=True)
class AdapterHeader:
    """An adapter's config and the headers of its tensors."""

    config: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def trained_on(self) -> str | None:
        """What peft noted as the base: a repository of the Hub, or a folder on the trainer's machine."""
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    @property
    def revision(self) -> str | None:
        """The base's revision, where peft noted one."""
        revision = self.config.get("revision")
        return revision if isinstance(revision, str) and revision else None


def adapter_files(paths: Collection[str]) -> tuple[str, ...]:
    """Select an adapter's own files, and the tokenizer's, which replace those of the base. Raises NightpressError(unsupported_format)."""
    missing = [name for name in (ADAPTER_FILE, ADAPTER_WEIGHTS) if name not in paths]
    if missing:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"The adapter has no {' and no '.join(missing)}.",
            hint="Bring the folder that `save_pretrained` of peft wrote. An adapter_model.bin is turned into safetensors by `nightpress convert`.",
            file=missing[0],
        )
    taken = [path for path in paths if "/" not in path and is_model_file(path) and _TOKENIZER.fullmatch(path)]
    return (ADAPTER_FILE, ADAPTER_WEIGHTS, *sorted(taken))


def read_adapter(config: Any, tensors: Sequence[TensorInfo], base: Sequence[TensorInfo]) -> Adapter:
    """Match an adapter with its base. tensors: of the adapter; base: the base's tensors, as floats.

    Raises NightpressError: unsupported_format for a kind of adapter that can't be merged exactly, malformed_model if it does not fit the base.
    """
    if not isinstance(config, dict):
        raise malformed(ADAPTER_FILE, "it is not a JSON object")
    _refuse_others(config)
    found = {tensor.name: tensor for tensor in tensors}
    names = _Names(base)
    merges: dict[str, Merge] = {}
    grown: dict[str, tuple[int, ...]] = {}
    ranks: set[int] = set()
    for target, parts in _grouped(found):
        stored = names.find(target)
        if stored is None:
            raise _does_not_fit(f"it changes {target[:200]}, which the base does not have")
        if stored.name in merges:
            raise _does_not_fit(f"it changes {stored.name[:200]} twice")
        if "new" in parts and (shape := _replacing_shape(found[parts["new"]], stored)) != stored.shape:
            grown[stored.name] = shape
            stored = replace(stored, shape=shape)
        if parts.keys() == {"new"}:
            merges[stored.name] = Merge("replaced", parts)
        else:
            merges[stored.name] = _low_rank(config, target.removesuffix(".weight"), parts, found, stored)
            ranks.add(found[merges[stored.name].parts["a"]].shape[0])
    if not merges:
        raise malformed(ADAPTER_WEIGHTS, "it has no tensors of an adapter")
    kind = "dora" if config.get("use_dora") else "lora"
    detail = f"{kind} of rank {', '.join(map(str, sorted(ranks)[:4])) or '0'} on {len(merges)} weights"
    return Adapter(merges, grown, detail)


def _refuse_others(config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", "")).upper()
    begun = str(config.get("init_lora_weights", "")).lower()
    flaw = None
    if kind != "LORA":
        flaw = f"it is of the kind {kind[:40] or 'unknown'}; LoRA and DoRA are merged here"
    elif begun.startswith(_CHANGES_BASE):
        flaw = f"its training began by changing the base (`init_lora_weights: {begun[:40]}`)"
    elif (
        config.get("use_qalora")
        or config.get("lora_bias")
        or config.get("alora_invocation_tokens")
        or config.get("trainable_token_indices")
    ):
        flaw = "it uses `use_qalora`, `lora_bias`, `alora_invocation_tokens` or `trainable_token_indices`, which are not merged here"
    elif config.get("target_parameters"):
        flaw = "it changes fused parameters (`target_parameters`), which are not merged here"
    if flaw is not None:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"The adapter can't be merged: {flaw}.",
            hint="Merge it with peft (`merge_and_unload().save_pretrained(folder)`) and bring that folder.",
            file=ADAPTER_FILE,
        )


def _grouped(found: Mapping[str, TensorInfo]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (the weight's name in the whole model, role → tensor)."""
    roles = {
        ".lora_A.weight": "a",
        ".lora_B.weight": "b",
        ".lora_embedding_A": "a_embedding",
        ".lora_embedding_B": "b_embedding",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_magnitude_vector": "magnitude",
    }
    groups: dict[str, dict[str, str]] = {}
    for name in found:
        bare = name.removeprefix(_PREFIX)
        ending = next((ending for ending in roles if bare.endswith(ending)), None)
        if ending is None:
            target = (
                bare.replace(".modules_to_save.default.", ".")
                .replace(".modules_to_save.", ".")
                .replace(".base_layer.", ".")
            )
            groups.setdefault(target, {})["new"] = name
        else:
            groups.setdefault(f"{bare.removesuffix(ending)}.weight", {})[roles[ending]] = name
    yield from groups.items()


def _low_rank(
    config: Mapping[str, Any], module: str, parts: dict[str, str], found: Mapping[str, TensorInfo], stored: TensorInfo
) -> Merge:
    embedding = "a_embedding" in parts
    if embedding:
        parts = {{"a_embedding": "a", "b_embedding": "b"}.get(role, role): name for role, name in parts.items()}
    if not {"a", "b"} <= parts.keys() or (embedding and "magnitude" in parts):
        raise _does_not_fit(f"its parts of {module[:200]} are incomplete, or are of a kind that is not merged here")
    a, b = found[parts["a"]], found[parts["b"]]
    transposed = bool(config.get("fan_in_fan_out")) and not embedding
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise _does_not_fit(f"its parts of {module[:200]} are no matrices: convolutions are not merged here")
    change = (b.shape[0], a.shape[1]) if not (transposed or embedding) else (a.shape[1], b.shape[0])
    fits = a.shape[0] == b.shape[1] > 0 and change == stored.shape
    if fits and "magnitude" in parts:
        fits = math.prod(found[parts["magnitude"]].shape) == b.shape[0]
    if not fits:
        raise _does_not_fit(
            f"its matrices for {stored.name[:200]} have the shapes {list(a.shape)} and {list(b.shape)}, and the base's weight {list(stored.shape)}"
        )
    if bool(config.get("use_dora")) != ("magnitude" in parts):
        raise _does_not_fit(f"its config and its tensors differ on whether {module[:200]} has a magnitude")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise malformed(ADAPTER_FILE, "`lora_alpha` is no number")
    rank = a.shape[0]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Merge("embedding" if embedding else "linear", parts, scale, transposed)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the pattern that fits the module, as peft matches: the pattern is the end of the module's name."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if len(pattern) <= 500 and re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise malformed(ADAPTER_FILE, f"`alpha_pattern` has {pattern[:60]!r}, which is no pattern") from error
    return default


def _replacing_shape(new: TensorInfo, stored: TensorInfo) -> tuple[int, ...]:
    """The shape of a replaced tensor. Only a table of tokens may get another number of rows."""
    rows_alone = len(new.shape) == len(stored.shape) == 2 and new.shape[1] == stored.shape[1]
    is_table = any(word in stored.name for word in ("embed", "lm_head", "wte"))
    if new.shape != stored.shape and not (rows_alone and is_table):
        raise _does_not_fit(
            f"its {stored.name[:200]} has the shape {list(new.shape)}, and the base's {list(stored.shape)}"
        )
    return new.shape


class _Names:
    """Finds the base's tensor for a weight's name in the whole model. A base that was saved without its head lacks the first part."""

    def __init__(self, base: Iterable[TensorInfo]) -> None:
        self._base = {tensor.name: tensor for tensor in base}

    def find(self, name: str) -> TensorInfo | None:
        candidates = [
            name,
            name.partition(".")[2],
            *(f"{prefix}.{name}" for prefix in ("model", "transformer", "bert")),
        ]
        return next((self._base[candidate] for candidate in candidates if candidate in self._base), None)


def _does_not_fit(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.MALFORMED_MODEL,
        f"The adapter does not fit this base: {why}.",
        hint="Name the model that it was trained for: `base_model_name_or_path` in its adapter_config.json says which.",
        file=ADAPTER_WEIGHTS,
    )
