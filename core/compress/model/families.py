"""The names of the modules of each model family, for all passes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """A place where a layer's inputs can be scaled without changing the model's output or cost.

    The outputs of `source` are divided by factors, and the columns of `targets` are multiplied by them. Only `targets` and `routers` read
    the source's output. Names are those of a block's modules in the files; `*` stands for an expert's number. A source with `*` is a fold
    in each expert, with factors of its own. Without `*`, all experts share the factors.
    """

    source: str
    targets: tuple[str, ...]  #: linear layers to round
    kind: str  #: of the source: "norm"; "norm+1" (multiplies by 1 + weight); "linear" (rows are divided); "values" (value projection)
    #: Matrices that stay in float. Their columns are multiplied, too, so that routing does not change.
    routers: tuple[str, ...] = ()


def _llama(*, norm: str = "norm", before_feed_forward: str = "post_attention_layernorm") -> tuple[Fold, ...]:
    return (
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "values"),
        Fold(before_feed_forward, ("mlp.gate_proj", "mlp.up_proj"), norm),
        Fold("mlp.up_proj", ("mlp.down_proj",), "linear"),
    )


def _mixture(
    mixture: str, gate: str, up: str, down: str, *, shared: str | None = None, dense: bool = False
) -> tuple[Fold, ...]:
    """Llama's folds with experts in place of the feed-forward part. dense: some blocks keep the feed-forward part, so its folds stay."""
    expert, folds = f"{mixture}.experts.*", list(_llama() if dense else _llama()[:2])
    takers, routers = [f"{expert}.{gate}", f"{expert}.{up}"], [f"{mixture}.gate"]
    if shared is not None:
        takers += [f"{mixture}.{shared}.{gate}", f"{mixture}.{shared}.{up}"]
        routers += [f"{mixture}.{shared}_gate"]
        folds.append(Fold(f"{mixture}.{shared}.{up}", (f"{mixture}.{shared}.{down}",), "linear"))
    folds.append(Fold("post_attention_layernorm", tuple(takers), "norm", tuple(routers)))
    return (*folds, Fold(f"{expert}.{up}", (f"{expert}.{down}",), "linear"))


_PARTS = ("gate_proj", "up_proj", "down_proj")

#: By config.json's `model_type`.
FOLDS: dict[str, tuple[Fold, ...]] = {
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma": _llama(norm="norm+1"),
    "gemma2": _llama(norm="norm+1", before_feed_forward="pre_feedforward_layernorm"),
    "gemma3_text": _llama(norm="norm+1", before_feed_forward="pre_feedforward_layernorm"),
    "mixtral": _mixture("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _mixture("mlp", *_PARTS, shared="shared_expert", dense=True),
    "qwen3_moe": _mixture("mlp", *_PARTS, dense=True),
    "olmoe": _mixture("mlp", *_PARTS),
    "starcoder2": (
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm"),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "values"),
        Fold("post_attention_layernorm", ("mlp.c_fc",), "norm"),
    ),
    "phi3": (
        Fold("input_layernorm", ("self_attn.qkv_proj",), "norm"),
        Fold("post_attention_layernorm", ("mlp.gate_up_proj",), "norm"),
    ),
    "phi": (
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"), "norm"),
        Fold("self_attn.v_proj", ("self_attn.dense",), "values"),
    ),
    "gpt_neox": (
        Fold("input_layernorm", ("attention.query_key_value",), "norm"),
        Fold("post_attention_layernorm", ("mlp.dense_h_to_4h",), "norm"),
    ),
    "opt": (
        Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "norm"),
        Fold("self_attn.v_proj", ("self_attn.out_proj",), "values"),
        Fold("final_layer_norm", ("fc1",), "norm"),
        Fold("fc1", ("fc2",), "linear"),  # a ReLU between them commutes with a positive factor
    ),
}
