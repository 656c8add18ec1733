"""Renders conversations with a model's chat template.

A template is an untrusted program that came with the model. It runs in a process of its own, in Jinja's immutable sandbox, with limits on
time, memory and the length of its output.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError

_RENDERER = Path(__file__).with_name("chat_renderer.py")
_SECONDS = 60
_TURNS = 4  #: of a chat that is made of texts
#: The time that a template's `strftime_now` formats. It is constant, because a rendered date would change the bytes of the result.
RENDERED_AT = datetime(2025, 1, 1, tzinfo=UTC)


def render_conversations(
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    model_dir: Path,
    *,
    ref: str,
    answering: bool = False,
    tools: Sequence[Sequence[Any]] = (),
) -> list[str]:
    """Render each conversation, a list of {"role", "content"}, to one text with the template's markers.

    answering: end each with the marker behind which the model writes its answer. tools: the functions that each may call; empty: none of them any.

    Raises NightpressError(invalid_data) if the model has no template, or if rendering fails or takes too long.
    """
    template, tokens = _template_of(model_dir, ref)
    asked = {
        "template": template,
        "tokens": tokens,
        "conversations": conversations,
        "now": RENDERED_AT.isoformat(),
        "answering": answering,
        "tools": [list(found) or None for found in tools] or [None] * len(conversations),
    }
    request = json.dumps(asked, default=str).encode()
    with tempfile.TemporaryFile() as out:
        try:
            run = subprocess.run(
                [sys.executable, "-I", "-B", str(_RENDERER)],
                input=request,
                stdout=out,
                stderr=subprocess.PIPE,
                timeout=_SECONDS,
                env={},
            )
        except subprocess.TimeoutExpired as error:
            raise _refused(ref, f"it takes more than {_SECONDS} s") from error
        if run.returncode:
            said = run.stderr.decode(errors="replace").strip().splitlines()
            raise _refused(ref, said[-1][:300] if said and run.returncode > 0 else "it takes too much time or memory")
        out.seek(0)
        texts: list[str] = json.loads(out.read())
    return texts


def _template_of(model_dir: Path, ref: str) -> tuple[str, dict[str, str]]:
    """The template, and the special tokens that it may use: name → token."""
    config = _json(model_dir / "tokenizer_config.json")
    template = chat_template(model_dir)
    if template is None:
        raise NightpressError(
            ErrorCode.INVALID_DATA,
            f"The data set {ref} holds conversations, and the model has no chat template to render them.",
            hint="Add chat_template.jinja to the model, or bring rows with a `text`.",
            data=ref,
        )
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return template, tokens


def as_chats(texts: Sequence[str], model_dir: Path, *, ref: str) -> list[str]:
    """Render texts, one after the other, as the turns of user and assistant in the model's template.

    They stand in for chats, of which none are in the public domain: what a model must not lose is how it reads the template's markers.
    Raises NightpressError(invalid_data) as `render_conversations` does.
    """
    roles = ("user", "assistant") * (_TURNS // 2)
    conversations = [
        [{"role": role, "content": text} for role, text in zip(roles, texts[at : at + _TURNS], strict=True)]
        for at in range(0, len(texts) - _TURNS + 1, _TURNS)
    ]
    return render_conversations(conversations, model_dir, ref=ref)


def chat_template(model_dir: Path) -> str | None:
    """The model's chat template, a Jinja template; of several, the default one. None if there is none."""
    file = model_dir / "chat_template.jinja"
    template: Any = (
        file.read_text() if file.is_file() else _json(model_dir / "tokenizer_config.json").get("chat_template")
    )
    template = template or _json(model_dir / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # some models have several templates, each with a name
        named = {variant.get("name"): variant.get("template") for variant in template if isinstance(variant, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    raw = json.loads(file.read_bytes())
    return raw if isinstance(raw, dict) else {}


def _refused(ref: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_DATA,
        f"The model's chat template can't render the conversations of {ref}: {why}.",
        hint="Check the template and the roles it takes, or bring rows with a `text`.",
        data=ref,
    )
