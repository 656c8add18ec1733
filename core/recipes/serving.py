"""Which artifacts vLLM must load, what is measured there, and what that costs. No torch here."""

from nightpress.core.recipes.costs import GPU_CONSUMER_BYTES, Cost
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import GenerationSpeed, Latency, Recipe
from nightpress.core.recipes.passes import KvCache

REQUESTS = (1, 8, 64)  #: requests that are served at a time
PROMPT, WRITTEN = 64, 32  #: tokens of a request, and tokens that are written for it
CHECKED, CHECK_PROMPT, CHECK_WRITTEN = (
    8,
    96,
    16,
)  #: texts of the verification, their tokens, and the tokens written after each
_ROUNDS = 4  #: of each number of requests, with the first, which is not timed
_STEP = 8  #: time of writing a token for several requests at once, in tokens of a forward pass
_CACHE_BLOCK = 128  #: tokens; vLLM gives each request whole blocks of its cache
_CACHE_SPARE = 64 * 1024**2
VLLM_BYTES = (
    900 * 1024**2
)  #: anonymous memory of vLLM's process without model and cache; 830 MiB were measured with 0.32
_START_S = 25.0  #: to import vLLM and start its engine


def serves(recipe: Recipe, export: Export, header: ModelHeader) -> bool:
    """Return whether vLLM is to load this artifact: codes of compressed-tensors, and floats that the target means for vLLM.

    vLLM has no cache in int8.
    """
    if any(isinstance(options, KvCache) and options.format == "int8" for options in recipe.passes):
        return False
    return header.task == "causal-lm" and (
        export.format == "compressed-tensors" or (export.format == "safetensors" and recipe.target == "gpu-vllm")
    )


def times_serving(recipe: Recipe) -> bool:
    """Return whether requests are also timed: only for a recipe that times something."""
    return any(isinstance(evaluation, Latency | GenerationSpeed) for evaluation in recipe.evaluate)


def lengths(header: ModelHeader, prompt: int, written: int) -> tuple[int, int]:
    """Return the tokens of prompt and continuation, shorter if the model has few positions."""
    limit = header.positions or prompt + written
    if prompt + written <= limit:
        return prompt, written
    return limit - limit // 4, limit // 4


def cache_bytes(header: ModelHeader) -> int:
    """Return the bytes of key/value cache for the most requests at a time, in 16 bits, or in 32 for a model in float32."""
    config = header.config
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    width = int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 1)
    pairs = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or width // heads)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    bytes_each = 4 if any(tensor.dtype == "F32" and len(tensor.shape) == 2 for tensor in header.tensors) else 2
    blocks = max(REQUESTS) * -(-(PROMPT + WRITTEN) // _CACHE_BLOCK) + CHECKED
    return 2 * layers * pairs * bytes_each * _CACHE_BLOCK * blocks + _CACHE_SPARE


def serving_cost(recipe: Recipe, header: ModelHeader) -> Cost | None:
    """Return the cost of running the artifacts in vLLM, without the child; None: vLLM loads none of them.

    It is largest while the source is timed beside an artifact, each in a process of its own.
    """
    artifacts = sum(serves(recipe, export, header) for export in recipe.exports)
    if not artifacts:
        return None
    timed = times_serving(recipe)
    processes = 2 if timed else 1
    floats = processes * (header.size + cache_bytes(header))
    requests = sum(REQUESTS) * (PROMPT + _STEP * WRITTEN) * _ROUNDS if timed else 0
    checked = 2 * CHECKED * (CHECK_PROMPT + CHECK_WRITTEN * _STEP)  # in vLLM, and with the dequantized weights
    work = (artifacts * (checked + requests) + timed * requests) * header.parameters
    seconds = (artifacts + timed) * _START_S
    beside = processes * (VLLM_BYTES + GPU_CONSUMER_BYTES)
    return Cost(processes * VLLM_BYTES + floats, seconds, work, floats, host_bytes=beside)
