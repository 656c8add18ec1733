"""Headers of models of any size, without weights: a plan needs only the header."""

import math
from typing import Any

from nightpress.core.recipes.header import ModelHeader, TensorInfo


def tensor(name: str, *shape: int, dtype: str = "BF16") -> TensorInfo:
    width = {"BF16": 2, "F32": 4}[dtype]
    return TensorInfo(name=name, dtype=dtype, shape=shape, size=width * math.prod(shape))


def decoder(
    hidden: int, inner: int, heads: int, key_heads: int, layers: int, *, vocabulary: int, tied: bool = False
) -> ModelHeader:
    """A header of Llama's architecture, in bf16."""
    keys = hidden // heads * key_heads
    matrices = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = [tensor("model.embed_tokens.weight", vocabulary, hidden), tensor("model.norm.weight", hidden)]
    tensors += [] if tied else [tensor("lm_head.weight", vocabulary, hidden)]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors += [tensor(f"{at}{name}.weight", *shape) for name, shape in matrices.items()]
        tensors += [tensor(f"{at}{name}_layernorm.weight", hidden) for name in ("input", "post_attention")]
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }
    return _header("llama", "LlamaForCausalLM", config, tensors)


def encoder(hidden: int, heads: int, layers: int) -> ModelHeader:
    """A header of BERT's architecture, in fp32."""

    def place(name: str, rows: int, columns: int) -> list[TensorInfo]:
        return [tensor(f"{name}.weight", rows, columns, dtype="F32"), tensor(f"{name}.bias", rows, dtype="F32")]

    tensors = [tensor("embeddings.word_embeddings.weight", 30522, hidden, dtype="F32")]
    for layer in range(layers):
        at = f"encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            tensors += place(at + name, hidden, hidden)
        tensors += place(at + "intermediate.dense", 4 * hidden, hidden) + place(at + "output.dense", hidden, 4 * hidden)
    config = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
    }
    return _header("bert", "BertModel", config, tensors)


def _header(model_type: str, architecture: str, config: dict[str, Any], tensors: list[TensorInfo]) -> ModelHeader:
    return ModelHeader(
        model_type=model_type, architecture=architecture, config=config, tensors=tuple(tensors), has_tokenizer=True
    )


def mixture(hidden: int, inner: int, *, experts: int, chosen: int, layers: int, vocabulary: int) -> ModelHeader:
    """A header of OLMoE's architecture, in bf16."""
    tensors = [tensor("model.embed_tokens.weight", vocabulary, hidden)]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors += [tensor(f"{at}self_attn.{name}_proj.weight", hidden, hidden) for name in "qkvo"]
        tensors.append(tensor(f"{at}mlp.gate.weight", experts, hidden))
        for expert in range(experts):
            parts = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
            tensors += [tensor(f"{at}mlp.experts.{expert}.{name}.weight", *size) for name, size in parts.items()]
    config = {"hidden_size": hidden, "num_experts": experts, "num_experts_per_tok": chosen, "vocab_size": vocabulary}
    return _header("olmoe", "OlmoeForCausalLM", config, tensors)
