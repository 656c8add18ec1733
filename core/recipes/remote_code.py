"""Fields of a model's JSON that make transformers download or run foreign code.

Found by reading transformers 5.23: configuration_utils, modeling_utils, generation, pipelines, processing_utils, integrations/hub_kernels.
"""

from typing import Any

from nightpress.core.recipes.filenames import INDEX_FILE, WEIGHTS_FILE

#: The allowed values. Any other value names a kernel of the Hub, or makes transformers download a kernel if a library is not installed.
_ATTENTION = frozenset({"eager", "sdpa", "flex_attention"})
_EXPERTS = frozenset({"eager", "batched_mm", "grouped_mm"})
_BUILT_IN = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "_attn_implementation_internal": _ATTENTION,
    "experts_implementation": _EXPERTS,
    "_experts_implementation": _EXPERTS,
    "_experts_implementation_internal": _EXPERTS,
    "transformers_weights": frozenset({WEIGHTS_FILE, INDEX_FILE}),  #: other files were not checked
}
#: Fields whose only purpose is foreign code. A false or empty value is harmless.
_CODE = frozenset(
    {
        "custom_pipelines",
        "custom_generate",
        "kernel_config",
        "use_kernels",
        "allow_all_kernels",
        "trust_remote_code",
    }
)


def code_flaw(key: str, value: Any) -> str | None:
    """Return why a field is refused, as the end of a sentence that begins with the file's name; None: it is allowed."""
    if key == "auto_map":
        return "has an `auto_map`: the model wants to run code of its own"
    if key in _CODE or key.startswith("_custom_object"):
        return f"has `{key[:60]}`: the model wants to run code from elsewhere" if value else None
    allowed = _BUILT_IN.get(key)
    if allowed is None:
        return None
    for choice in (
        value.values() if isinstance(value, dict) else [value]
    ):  # a dict maps the name of a sub-config to its value
        if choice is not None and not (isinstance(choice, str) and choice in allowed):
            shown = f"{choice[:60]!r}" if isinstance(choice, str) else f"a {type(choice).__name__}"
            return f"has {shown} for `{key}`, which is none of {', '.join(sorted(allowed))}: it may load code or weights from elsewhere"
    return None
