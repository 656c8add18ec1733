"""What a family's parts are called, said once for every pass."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fold:
    """A place where inputs can be scaled for free: what `source` puts out is divided, the columns of `targets` are multiplied.

    Names are those of a block's modules. `targets` are all the linear layers that are given the source's output and nothing else is.
    """

    source: str
    targets: tuple[str, ...]
    kind: str  #: "norm"; "norm+1": a norm that multiplies by 1 + weight; "linear": its rows; "values": an attention's value projection


def _llama(*, norm: str = "norm", before_feed_forward: str = "post_attention_layernorm") -> tuple[Fold, ...]:
    return (
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "values"),
        Fold(before_feed_forward, ("mlp.gate_proj", "mlp.up_proj"), norm),
        Fold("mlp.up_proj", ("mlp.down_proj",), "linear"),
    )


#: By config.json's `model_type`.
FOLDS: dict[str, tuple[Fold, ...]] = {
    "llama": _llama(),
    "mistral": _llama(),
    "qwen2": _llama(),
    "qwen3": _llama(),
    "gemma": _llama(norm="norm+1"),
    "gemma2": _llama(norm="norm+1", before_feed_forward="pre_feedforward_layernorm"),
    "gemma3_text": _llama(norm="norm+1", before_feed_forward="pre_feedforward_layernorm"),
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
        Fold("fc1", ("fc2",), "linear"),  # a ReLU stands between: it lets a positive factor through
    ),
}
