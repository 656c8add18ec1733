"""Renders conversations with a chat template: reads a JSON request from standard input, writes a JSON list of texts to standard output.

It runs as a script: a template that loops for ever or fills the memory ends only this process.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_CPU_SECONDS = 30
_MEMORY = 1024**3
_MAX_CHARACTERS = 1024**2  # of one conversation


class GenerationMarks(Extension):
    """`{% generation %} … {% endgeneration %}` marks what the model is trained to write. The marks change nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja's class has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    request = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationMarks]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = datetime.fromisoformat(request["now"]).strftime
    try:
        template = environment.from_string(request["template"])
        given = request["tokens"] | {"add_generation_prompt": request["answering"]}
        texts = [
            _render(template, conversation, tools, given)
            for conversation, tools in zip(request["conversations"], request["tools"], strict=True)
        ]
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    json.dump(texts, sys.stdout)


def _render(template: Any, messages: list[dict[str, Any]], tools: list[Any] | None, given: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(messages=messages, tools=tools, documents=None, **given):
        size += len(part)
        if size > _MAX_CHARACTERS:
            raise ValueError(f"a conversation is rendered to more than {_MAX_CHARACTERS} characters")
        parts.append(part)
    return "".join(parts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it, without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
