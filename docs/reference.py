"""Write the pages that follow from the code: settings, error codes, passes. `python docs/reference.py`; a test keeps them in step."""

import inspect
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from typer.core import TyperGroup
from typer.main import get_command

from nightpress.client.cli.main import app
from nightpress.core.errors import ERROR_KINDS
from nightpress.core.handoff.report import Report
from nightpress.core.recipes.builtins import builtin_recipes, builtin_text
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.gates import GATE_METRICS
from nightpress.core.recipes.models import GenerationSpeed, Latency, Quality, Recipe
from nightpress.core.recipes.passes import catalog
from nightpress.core.recipes.targets import AIMS, Aim
from nightpress.core.settings import Settings, load_settings

_GENERATED = "<!-- Written by docs/reference.py from the code; change the code, not this page. -->\n\n"


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _default_of(name: str, field: FieldInfo) -> str:
    if name == "data_dir":
        return "`~/.nightpress`"
    default = field.get_default(call_default_factory=True, validated_data={})
    return "" if default in (None, "") else f"`{default}`"


def settings_page() -> str:
    rows: list[tuple[object, ...]] = []
    for name, field in Settings.model_fields.items():
        rows.append((f"`NIGHTPRESS_{name.upper()}`", _default_of(name, field), field.description or ""))
    return (
        "# Settings\n\n"
        + _GENERATED
        + "Every value can come from the environment or from a file `.env` in the working folder. "
        "Sizes are bytes, durations seconds; lists are JSON. Every default works on a laptop.\n\n"
        + _table(("variable", "default", "meaning"), rows)
    )


def errors_page() -> str:
    rows: list[tuple[object, ...]] = [
        (f"`{code.value}`", kind.status, kind.title, "yes" if kind.retryable else "no")
        for code, kind in ERROR_KINDS.items()
    ]
    return (
        "# Errors\n\n"
        + _GENERATED
        + "One closed set of codes serves HTTP problems (RFC 9457), failed jobs and the command line. "
        "Each error says what happened and, in `hint`, what to do. A job that fails with a code that is tried again goes back to its "
        "queue, until it has failed as often as it may.\n\n"
        + _table(("code", "HTTP status", "meaning", "tried again"), rows)
    )


def _type_of(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(_type_of(choice) for choice in schema["anyOf"])
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([str(schema.get("type", schema.get("$ref", "")).rsplit("/", 1)[-1]), *bounds])


def _fields(model: Any) -> str:
    schema = model.model_json_schema()
    rows: list[tuple[object, ...]] = []
    for name, field in schema["properties"].items():
        if name in {"pass"}:
            continue
        default = field.get("default", "")
        rows.append(
            (
                f"`{name}`",
                _type_of(field),
                f"`{default}`" if default not in ("", None) else "",
                field.get("description", ""),
            )
        )
    return _table(("field", "takes", "default", "meaning"), rows)


def _doc(model: Any) -> str:
    return "\n".join(line.strip() for line in (model.__doc__ or "").splitlines()).strip()


def _aim(name: str, aim: Aim) -> tuple[object, ...]:
    passes = ", ".join(
        "`" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "`" for options in aim.passes
    )
    return (
        f"`{name}`",
        passes,
        ", ".join(f"`{Export.model_validate(export).name}`" for export in aim.exports),
        aim.because,
    )


def recipes_page() -> str:
    parts = [
        "# Recipes\n\n"
        + _GENERATED
        + "A recipe is a name, an ordered list of passes, the exports, and how the result is judged. "
        "`nightpress recipes` lists those that come with Nightpress; `nightpress recipes show NAME` prints one to start from, and "
        "`POST /v1/recipes/validate` (or `nightpress recipes validate FILE`) answers with the normalised recipe, the plan, an estimate and warnings.\n",
        "## Fields\n\n" + _fields(Recipe),
        "## Targets\n\n"
        "A recipe with a `target` may leave out `passes`, `exports` or both. The target fills them in, and the recipe is stored, fingerprinted and shown with them. "
        "Exports that the target's runtimes don't load are refused. `auto` means `cpu-llm` for language models that llama.cpp runs, up to "
        "8 billion parameters, `gpu-vllm` for other language models, and `cpu-encoder` for text encoders.\n\n"
        + _table(("target", "passes", "exports", "why"), [_aim(name, aim) for name, aim in AIMS.items()]),
        "## Passes\n",
    ]
    for options in catalog.pass_types():
        name = str(options.model_fields["pass_"].default)
        carriers = ", ".join(f"`{carrier}`" for carrier in sorted(options.exports))
        provider = catalog.provider_of(name)
        package = "" if provider is None else f"From the package {provider}. "
        parts.append(
            f"### {name}\n\n{_doc(options)}\n\n{package}Needs: {options.needs}. Result carried by: {carriers}.\n\n{_fields(options)}"
        )
    parts.append("## Calibration\n\n" + _doc(Calibration) + "\n\n" + _fields(Calibration))
    parts.append("## Evaluation\n\n### quality\n\n" + _doc(Quality) + "\n\n" + _fields(Quality))
    parts.append("### latency\n\n" + _doc(Latency) + "\n\n" + _fields(Latency))
    parts.append("### generation-speed\n\n" + _doc(GenerationSpeed) + "\n\n" + _fields(GenerationSpeed))
    parts.append(
        '## Gates\n\nA gate bounds a figure: `perplexity: "<= +3%"` (a signed percentage is a change against the source), `size: "<= 35%"` '
        '(an unsigned one is a share of the source), `throughput: ">= 1.5x"` (a factor; `"<= 0.7x best"` and `"<= 0.7x runtime"` compare a speed with the [uncompressed model in the same runtime](evaluation.md#intervals-and-gates)), `cosine: ">= 0.99"` (the value itself), `"kl_divergence[code]": "<= 0.2"` (a [slice of the data](evaluation.md#slices); `[*]` is every slice). '
        "The unfavourable end of the figure's 95% interval decides. When a gate is missed, the verdict is `rejected`, and the artifacts are kept.\n\n"
        f"Figures: {', '.join(f'`{name}`' for name in GATE_METRICS)}.\n"
    )
    parts.append("## Built-in recipes\n")
    parts += [
        f"### {recipe.name}\n\n{recipe.description}\n\n```yaml\n{builtin_text(recipe.name)}```\n"
        for recipe in builtin_recipes().values()
    ]
    return "\n".join(parts)


def commands_page() -> str:
    parts = [
        "# Commands\n\n"
        + _GENERATED
        + "Every command with its arguments and options. [Command line](cli.md) says what all commands have in common, such as exit statuses. Each takes `--api URL`, `--profile NAME`, "
        "`--json` and `--help`. `nightpress --install-completion` makes your shell complete them.\n"
    ]
    for words, command in _commands(get_command(app), ("nightpress",)):
        rows: list[tuple[object, ...]] = [
            (_spelling(parameter), getattr(parameter, "help", "") or "")
            for parameter in command.params
            if parameter.name not in {"_api", "_profile", "_json", "install_completion", "show_completion"}
        ]
        parts.append(f"## {' '.join(words)}\n\n{inspect.cleandoc(command.help or '')}\n")
        if rows:
            parts.append(_table(("", ""), rows))
    return "\n".join(parts)


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something by itself, in the order of `--help`."""
    if not isinstance(command, TyperGroup):
        yield words, command
        return
    if command.invoke_without_command:
        yield words, command
    for name, subcommand in command.commands.items():
        yield from _commands(subcommand, (*words, name))


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    return ", ".join(f"`{word}`" for word in (*parameter.opts, *parameter.secondary_opts))


def report_schema() -> str:
    return json.dumps(Report.model_json_schema(), indent=1) + "\n"


_FAMILIES = Path(__file__).parent.parent / "tests" / "zoo" / "expected.json"
_CELLS = (
    "weight-only",
    "gptq",
    "awq",
    "smoothquant",
    "wanda",
    "kv-cache",
    "layers",
    "onnx",
    "openvino",
    "gguf",
    "mlx",
)
_MARKS = {"works": "yes", "refused": "no", "fails": "fails"}


def families_page() -> str:
    """What was tried on a tiny random model of each class of transformers, from the file that `python -m tests.zoo` writes."""
    parts = [
        "# Families\n\n",
        _GENERATED,
        (
            "Each class of transformers was built in tiny, with random weights, and each pass and export was tried on it (`python -m tests.zoo`). "
            "*yes*: it works, and what was loaded answers as it should. *no*: it is refused, with the reason below the table. *fails*: it breaks, "
            "and this is known. A class that has no tiny form was not tried. Nothing here depends on this list: a model of another family is "
            "taken by its structure ([decision](decisions/0117-families-by-structure.md)).\n"
        ),
    ]
    for kind, rows in json.loads(_FAMILIES.read_bytes()).items():
        tried = {name: row for name, row in rows.items() if "built" not in row}
        cells = list(dict.fromkeys(cell for row in tried.values() for cell in row if cell not in {"class", "inspect"}))
        order = [cell for cell in _CELLS if cell in cells]
        lines: list[tuple[object, ...]] = [
            (f"`{name}`", *(_MARKS[row[cell][0]] if cell in row else "" for cell in order))
            for name, row in tried.items()
        ]
        counts = [sum(row.get(cell, [""])[0] == "works" for row in tried.values()) for cell in order]
        lines.append((f"**of {len(tried)}**", *counts))
        parts.append(f"\n## {kind[0].upper()}{kind[1:]}\n\n" + _table(("type", *order), lines))
        reasons: dict[str, list[str]] = {}
        for name, row in tried.items():
            for cell in order:
                if cell in row and row[cell][0] != "works":
                    reasons.setdefault(f"{cell}: {row[cell][1].replace(name, '…')}", []).append(f"`{name}`")
        parts.append("\n" if reasons else "")
        parts += [f"- {', '.join(names)}: {_cell(why)}\n" for why, names in reasons.items()]
        unbuilt = [f"`{name}`" for name, row in rows.items() if "built" in row]
        parts.append(f"\nNot tried: {', '.join(unbuilt)}.\n" if unbuilt else "")
    return "".join(parts)


_CONSUMERS = Path(__file__).parent.parent / "tests" / "consumers" / "results"
#: File of results → the column's name.
COLUMNS = {
    f"{consumer}-{place.lower()}": f"{name}, {place}"
    for consumer, name in (("transformers", "transformers"), ("vllm", "vLLM"), ("llama.cpp", "llama.cpp"))
    for place in ("AVX2", "AVX-512", "GPU")[: 2 if consumer == "llama.cpp" else 3]
}
_LOADED = {"works": "yes", "refused": "no", "no kernel": "no kernel", "fails": "fails"}


def consumers_page() -> str:
    """What each consumer made of each scheme, from the files that `python -m tests.consumers` writes."""
    runs = {name: json.loads(file.read_bytes()) for name in COLUMNS if (file := _CONSUMERS / f"{name}.json").exists()}
    table: list[tuple[object, ...]] = []
    for scheme in dict.fromkeys(scheme for run in runs.values() for scheme in run["outcomes"]):
        states = [runs.get(name, {"outcomes": {}})["outcomes"].get(scheme, [""])[0] for name in COLUMNS]
        asked = any(state for name, state in zip(COLUMNS, states, strict=True) if name.startswith("transformers"))
        mark = ", **loaded by no consumer**" if asked and "works" not in states else ""
        table.append((scheme + mark, *(_LOADED.get(state, "") for state in states)))
    reasons: dict[str, list[str]] = {}
    for name, run in runs.items():
        for scheme, (state, why) in run["outcomes"].items():
            if why:
                reasons.setdefault(f"{COLUMNS[name]}: {_LOADED[state]}. {why}", []).append(scheme)
    return "".join(
        [
            "# Schemes and consumers\n\n",
            _GENERATED,
            (
                "Each scheme was written for a tiny decoder with random weights, and loaded by each consumer (`python -m tests.consumers`). "
                "*yes*: its answers are those of the dequantized weights. *no*: the plan refuses it. *no kernel*: the library has none for it "
                "on this processor. *fails*: it doesn't load, or answers otherwise. An empty cell was not run yet.\n\n"
            ),
            _table(("scheme", *COLUMNS.values()), table),
            "\n## Why not\n\n",
            *(f"- {', '.join(schemes)}: {_cell(why)}\n" for why, schemes in reasons.items()),
            "\n## Versions and dates\n\n",
            *(f"- {column}: {_tried(name, runs.get(name))}\n" for name, column in COLUMNS.items()),
        ]
    )


def _tried(name: str, run: dict[str, Any] | None) -> str:
    """When, where and with which versions a consumer was tried, or the command that tries it."""
    if run is None:
        consumer, _, place = name.partition("-")
        where = "with a GPU" if place == "gpu" else f"with {place.upper()}"
        return f"not run yet. On a machine {where}: `python -m tests.consumers {consumer}{' --device cuda' if place == 'gpu' else ''}`"
    day = date.fromisoformat(run["date"])
    versions = ", ".join(f"{package} {number}" for package, number in run["versions"].items())
    left = sum(not state for state, _ in run["outcomes"].values())
    parts = [f"{day.day} {day:%B %Y}, {run['processor']} ({', '.join(run['features'])}): {versions}"]
    parts += [f"{left} schemes were not run yet"] if left else []
    parts += [run["note"]] if "note" in run else []
    return "; ".join(parts)


def chart_page() -> str:
    """The README of the Helm chart, from its schema and its values."""
    chart = Path(__file__).parents[1] / "deploy" / "helm" / "nightpress"
    schema = json.loads((chart / "values.schema.json").read_text())["properties"]
    values = yaml.safe_load((chart / "values.yaml").read_text())
    rows: list[tuple[object, ...]] = []
    for name, value in values.items():
        inner = schema[name].get("properties")
        if inner is None:
            rows.append((f"`{name}`", "" if name == "workers" else _json(value), schema[name]["description"]))
        else:
            rows += [(f"`{name}.{key}`", _json(value[key]), inner[key]["description"]) for key in value]
    pool = schema["workers"]["additionalProperties"]["oneOf"][1]["properties"]
    pools = [
        (f"`{key}`", _json(values["workers"]["cpu"][key]), _json(values["workers"]["gpu"][key]), entry["description"])
        for key, entry in pool.items()
    ]
    return (
        "# The Helm chart of Nightpress\n\n"
        + _GENERATED
        + "`docs/how-to/kubernetes.md` says what the cluster needs first, and how to install it.\n\n"
        + _table(("value", "default", "meaning"), rows)
        + "\n## A pool of workers\n\n"
        + _table(("value", "`workers.cpu`", "`workers.gpu`", "meaning"), [*pools])
    )


def _json(value: object) -> str:
    return f"`{json.dumps(value)}`"


PAGES = {
    "../deploy/helm/nightpress/README.md": chart_page,
    "consumers.md": consumers_page,
    "families.md": families_page,
    "settings.md": settings_page,
    "errors.md": errors_page,
    "recipes.md": recipes_page,
    "commands.md": commands_page,
    "report.schema.json": report_schema,
}

if __name__ == "__main__":
    for fault in catalog.allow(load_settings().passes):
        raise SystemExit(fault)
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page())
