"""The module names of each family's blocks, attention and feed-forward layers, and the config keys of their sizes.

A single definition, without torch, for plans, estimates and the passes that remove channels, heads or blocks.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nightpress.core.numbers import whole_number
from nightpress.core.recipes.header import CONV1D, ModelHeader
from nightpress.core.recipes.linears import invalid

#: A part of a linear layer's outputs; a layer can have several, one after the other. "channel": feed-forward channels. "query": query
#: heads. "value": key heads or value heads. "triple": a query, a key and a value head in turn, for each head.
Part = Literal["channel", "query", "value", "triple"]


@dataclass(frozen=True)
class Inner:
    """An inner width of a block, between layers: the layers `inputs` write it, and only the layer `output` reads it."""

    inputs: tuple[tuple[str, tuple[Part, ...]], ...]  #: (module, parts of its outputs)
    output: str  #: module


@dataclass(frozen=True)
class Family:
    """The names of a family's modules within a block, and its keys of config.json."""

    blocks: str
    attention: Inner
    feed_forward: Inner
    layers: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    width: str = "intermediate_size"
    #: Whether config.json can express another number of heads of the same width: always, if the number divides the hidden size, or never.
    says_heads: Literal["any", "divisors", "never"] = "never"
    heads_fixed: str = ""  #: why no head can be removed; "": heads can be removed


def _inner(output: str, *inputs: str | tuple[str, tuple[Part, ...]], part: Part = "channel") -> Inner:
    return Inner(tuple((name, (part,)) if isinstance(name, str) else name for name in inputs), output)


def _projections(query: str, key: str, value: str, output: str) -> Inner:
    return Inner(((query, ("query",)), (key, ("value",)), (value, ("value",))), output)


def _bert(**more: Any) -> Family:
    own = "attention.self."
    return Family(
        "encoder.layer",
        _projections(own + "query", own + "key", own + "value", "attention.output.dense"),
        _inner("output.dense", "intermediate.dense"),
        **more,
    )


def _llama(says_heads: Literal["any", "divisors"] = "any") -> Family:
    return Family(
        "layers",
        _projections("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        _inner("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
        says_heads=says_heads,
    )


#: `model_type` of config.json → family.
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _bert()),
    "distilbert": Family(
        "transformer.layer",
        _projections("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        _inner("ffn.lin2", "ffn.lin1"),
        layers="n_layers",
        hidden="dim",
        heads="n_heads",
        width="hidden_dim",
    ),
    "mpnet": Family(
        "encoder.layer",
        _projections("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
        _inner("output.dense", "intermediate.dense"),
        heads_fixed="all its layers share one table of positions by head",
    ),
    "deberta-v2": Family(
        "encoder.layer",
        _projections(
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            "attention.output.dense",
        ),
        _inner("output.dense", "intermediate.dense"),
        heads_fixed="its heads also project positions",
    ),
    "modernbert": Family(
        "layers",
        Inner((("attn.Wqkv", ("query", "value", "value")),), "attn.Wo"),
        Inner((("mlp.Wi", ("channel", "channel")),), "mlp.Wo"),
    ),
    "llama": _llama("divisors"),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma": _llama(),
    "gemma2": _llama("divisors"),
    "phi": Family(
        "layers",
        _projections("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        _inner("mlp.fc2", "mlp.fc1"),
        says_heads="any",
    ),
    "phi3": Family(
        "layers",
        Inner((("self_attn.qkv_proj", ("query", "value", "value")),), "self_attn.o_proj"),
        Inner((("mlp.gate_up_proj", ("channel", "channel")),), "mlp.down_proj"),
        says_heads="any",
    ),
    "gpt2": Family(
        "h",
        Inner((("attn.c_attn", ("query", "value", "value")),), "attn.c_proj"),
        _inner("mlp.c_proj", "mlp.c_fc"),
        layers="n_layer",
        hidden="n_embd",
        heads="n_head",
        width="n_inner",
    ),
    "gpt_neox": Family(
        "layers",
        Inner((("attention.query_key_value", ("triple",)),), "attention.dense"),
        _inner("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
    ),
    "opt": Family(
        "layers",
        _projections("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        _inner("fc2", "fc1"),
        width="ffn_dim",
    ),
}

#: Lists in config.json with an entry for each block.
BY_LAYER = (
    "layer_types",
    "no_rope_layers",
    "mlp_layer_types",
    "layers_block_type",
    "attention_layers",
    "attention_window",
)
#: Keys of config.json for the number of blocks.
_DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
_BLOCK = re.compile(r"(?P<prefix>(?:[^.]*[^.0-9][^.]*\.)*)(?P<number>\d+)\.(?P<rest>.+)")
#: Key of config.json for a model whose layers have their own shapes, which the other keys can't express: it holds the counts of each layer.
OWN_SHAPES = "nightpress_shapes"


@dataclass(frozen=True)
class Anatomy:
    """The sizes and tensor names of a family's parts in a given model."""

    family: Family
    prefix: str  #: start of the tensors' names, before the number of a block
    layers: int
    hidden: int
    head_dim: int
    group: int  #: query heads that share a key and value head
    groups: tuple[int, ...]  #: key and value heads of each block
    widths: tuple[int, ...]  #: feed-forward channels of each block
    transposed: bool  #: whether weights are stored as [in, out]

    @property
    def heads(self) -> tuple[int, ...]:
        """Query heads of each block."""
        return tuple(self.group * count for count in self.groups)

    def part(self, part: Part) -> int:
        """Return the number of a part's outputs for each channel, or for each group of heads."""
        return {
            "channel": 1,
            "query": self.group * self.head_dim,
            "value": self.head_dim,
            "triple": 3 * self.head_dim,
        }[part]

    def unit(self, inner: Inner) -> int:
        """Return the number of inputs of `inner.output` for each channel, or for each group of heads."""
        return 1 if inner is self.family.feed_forward else self.group * self.head_dim

    def name(self, block: int, module: str, leaf: str = "weight") -> str:
        return f"{self.prefix}{block}.{module}.{leaf}"

    def place(self, name: str) -> tuple[int, str, str] | None:
        """Return (block, module, leaf) of a tensor, e.g. (0, "mlp.up_proj", "weight"); None if it is outside the blocks."""
        if not name.startswith(self.prefix):
            return None
        number, _, rest = name.removeprefix(self.prefix).partition(".")
        module, _, leaf = rest.rpartition(".")
        block = whole_number(number)
        return None if block is None else (block, module, leaf)


def anatomy_of(header: ModelHeader, asker: str) -> Anatomy:
    """Return the anatomy of a model.

    asker: the pass that the error names. Raises NightpressError(invalid_recipe) if the family or the model's layout is not known.
    """
    family = FAMILIES.get(header.model_type)
    if family is None:
        raise invalid(
            f"`{asker}` can't take a {header.model_type}: where its heads and channels lie is not known here.",
            f"It takes {', '.join(sorted(FAMILIES))}.",
        )
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    found = re.compile(rf"((?:.*\.)?{re.escape(family.blocks)}\.)0\.{re.escape(family.feed_forward.output)}\.weight")
    prefix = next((match[1] for name in shapes if (match := found.fullmatch(name))), None)
    config = header.config
    layers, hidden, heads = (config.get(key) for key in (family.layers, family.hidden, family.heads))
    if prefix is None or not all(isinstance(size, int) and size > 0 for size in (layers, hidden, heads)):
        raise invalid(
            f"`{asker}` can't take this model: its files have no {family.blocks}.0.{family.feed_forward.output}, or its config doesn't count its layers and heads.",
            "Save it once with a current transformers.",
        )
    assert isinstance(layers, int)
    assert isinstance(hidden, int)
    assert isinstance(heads, int)
    head_dim = config.get("head_dim") or hidden // heads
    group = heads // (config.get("num_key_value_heads") or heads)
    if not head_dim or not group:
        raise invalid(f"`{asker}` can't take this model: its config has more heads than fit.", "Check its config.json.")
    transposed = header.model_type in CONV1D
    wanted = [f"{prefix}{at}.{inner.output}.weight" for at in range(layers) for inner in _inners(family)]
    missing = [name for name in wanted if len(shapes.get(name, ())) != 2]
    if missing:
        raise invalid(f"`{asker}` can't take this model: its files have no matrix {missing[0]}.", "Check its files.")
    into = [shapes[name][0 if transposed else 1] for name in wanted]  # attention and feed-forward alternate
    return Anatomy(
        family=family,
        prefix=prefix,
        layers=layers,
        hidden=hidden,
        head_dim=head_dim,
        group=group,
        groups=tuple(count // (group * head_dim) for count in into[0::2]),
        widths=tuple(into[1::2]),
        transposed=transposed,
    )


def blocks_of(header: ModelHeader, asker: str) -> Anatomy:
    """Return the anatomy of a model of any family, found in the names of its tensors: its blocks, without what is in them.

    asker: the pass that the error names. Raises NightpressError(invalid_recipe) if the blocks can't be told apart, differ from each other
    in their tensors, or are not counted by the config.
    """
    if header.model_type in FAMILIES:
        return anatomy_of(header, asker)
    blocks: dict[str, dict[int, set[tuple[str, tuple[int, ...]]]]] = {}
    for tensor in header.tensors:
        if (found := _BLOCK.match(tensor.name)) is not None:
            inside = blocks.setdefault(found["prefix"], {}).setdefault(int(found["number"]), set())
            inside.add((found["rest"], tensor.shape))
    if len(blocks) != 1:
        raise invalid(
            f"`{asker}` can't take this model: its files have {len(blocks)} rows of blocks, and the pass takes one.",
            "Leave it out.",
        )
    ((prefix, row),) = blocks.items()
    if sorted(row) != list(range(len(row))) or len({frozenset(block) for block in row.values()}) != 1:
        raise invalid(
            f"`{asker}` can't take this model: its blocks differ, and what a block is follows from its place.",
            "Leave it out.",
        )
    key = next((name for name in _DEPTHS if header.config.get(name) == len(row)), None)
    if key is None:
        raise invalid(
            f"`{asker}` can't take this model: its config doesn't count its {len(row)} blocks.", "Leave it out."
        )
    nothing = Inner((), "")
    path = prefix.removesuffix(".").rsplit(".", 1)[-1]
    family = Family(path, nothing, nothing, layers=key)
    return Anatomy(family, prefix, len(row), 0, 0, 1, (), (), transposed=False)


def _inners(family: Family) -> Iterator[Inner]:
    yield family.attention
    yield family.feed_forward
