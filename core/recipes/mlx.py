"""Which models and grids MLX runs: Apple's library, and mlx-lm with it. No torch here.

mlx-lm has a class of its own for each family, which reads the tensors under transformers' names.
"""

from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.llama_cpp import sliding_window
from nightpress.core.recipes.schemes import Scheme

#: Values of `model_type` whose logits in mlx-lm 0.32 were those of transformers, in float and with codes (`tests.zoo --cells mlx`).
FAMILIES = frozenset(
    {
        *("afmoe", "ernie4_5", "gemma", "gemma4_text", "glm4", "glm4_moe", "gptj", "granite", "granitemoe", "helium"),
        *("hunyuan_v1_dense", "laguna", "llama", "ministral3", "mistral", "mixtral", "nemotron", "olmo2", "olmoe"),
        *("phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
    }
)
#: Of these, families whose attention has no window in mlx-lm.
_SEES_ALL = frozenset({"mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "starcoder2"})
_BITS = frozenset({2, 3, 4, 5, 6, 8})
_GROUPS = (128, 64, 32)


def why_not_mlx(header: ModelHeader) -> str | None:
    """Return why mlx-lm can't run this model as transformers does; None: it can."""
    if header.task != "causal-lm" or header.sees_images:
        return f"mlx-lm runs language models, and this is a {header.architecture}"
    if header.model_type not in FAMILIES:
        return f"mlx-lm was not seen to answer for a {header.model_type} as transformers does; docs/families.md has those for which it was"
    window = sliding_window(header.model_type, header.config) if header.model_type in _SEES_ALL else None
    if window is not None:
        return f"mlx-lm's {header.model_type} sees the whole text, and config.json says `sliding_window` {window}, less than its positions"
    return None


def mlx_group(columns: int, group_size: int | None) -> int | None:
    """Return the size of MLX's groups for a row of `columns` inputs whose scales are for `group_size` inputs each; None: there is none.

    A larger group is written as several with the same scale. group_size None: one scale for the row.
    """
    shared = group_size or columns
    return next((size for size in _GROUPS if shared % size == 0 and columns % size == 0), None)


def why_no_mlx_grid(scheme: Scheme) -> str | None:
    """Return why MLX has no layout for a scheme's codes; None: it has one."""
    if scheme.kind != "int" or scheme.activations is not None:
        return "MLX's layout here is for integers with inputs in float"
    if scheme.bits not in _BITS:
        return f"MLX packs {', '.join(map(str, sorted(_BITS)))} bits, not {scheme.bits}"
    if scheme.group_size is not None and scheme.group_size % min(_GROUPS):
        return f"MLX's groups have 32, 64 or 128 inputs, not {scheme.group_size}"
    return None
