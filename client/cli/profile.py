"""`nightpress profile`: the cost of running a local model, counted from its header."""

from pathlib import Path
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.press import require_core
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.folders import read_model_folder
from nightpress.core.recipes.passes import Profiling
from nightpress.core.recipes.profile import Device, Profile, by_kind, profile_of


def add_to(app: typer.Typer) -> None:
    app.command("profile", rich_help_panel="This machine")(takes_session(profile))


def profile(
    session: Session,
    model: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A local model folder.", exists=True, file_okay=False)
    ],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Texts at once; may be repeated.")] = None,
    length: Annotated[list[int] | None, typer.Option(min=1, help="Tokens a text; may be repeated.")] = None,
    device: Annotated[
        str, typer.Option(help="The device of the roofline: this (measured in a second), h100, a100, rtx-4090, none.")
    ] = "this",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the measurement.")] = 1,
) -> None:
    """Count a model's parameters, operations, bytes and key/value cache by kind of layer, and bound its speed on a device."""
    shapes = {"batch": tuple(batch) if batch else None, "length": tuple(length) if length else None}
    options = Profiling.model_validate({"device": device, **{key: value for key, value in shapes.items() if value}})
    header = read_model_folder(model).header
    options.check(header)
    found = profile_of(header, model.name, options.shapes, _device(options, threads))
    if session.json:
        output.print_json(found.model_dump(mode="json"))
        return
    _show(found)


def _device(options: Profiling, threads: int) -> Device | None:
    if options.device == "none":
        return None
    require_core()
    from nightpress.core.compress.roofline import device_of

    return device_of(options.device, threads=threads)


def _show(found: Profile) -> None:
    first = found.shapes[0]
    output.say(f"{found.subject}: {found.parameters / 1e6:,.1f} M parameters, {found.bytes / 1e6:,.1f} MB")
    kinds = [
        (
            kind,
            f"{work.parameters:,}",
            f"{work.bytes / 1e6:,.1f}",
            f"{work.flops / 1e9:,.2f}",
            f"{work.flops / max(first.flops, 1):.1%}",
        )
        for kind, work in by_kind(found).items()
    ]
    heads = ("kind", "parameters", "MB", f"GFLOP at {first.batch} × {first.length}", "share")
    output.print_table(heads, kinds, right=(1, 2, 3, 4))
    columns: dict[str, list[str]] = {
        "batch × tokens": [f"{shape.batch} × {shape.length}" for shape in found.shapes],
        "GFLOP": [f"{shape.flops / 1e9:,.2f}" for shape in found.shapes],
        "quadratic": [f"{shape.attention_share:.1%}" for shape in found.shapes],
        "FLOP/byte": [f"{shape.intensity:,.0f}" for shape in found.shapes],
        "at best": [_ms(shape.bound_ms) for shape in found.shapes],
        "limit": [shape.limit or "" for shape in found.shapes],
        "cache": [
            f"{shape.cache_bytes / 1e6:,.1f} MB" if shape.cache_bytes is not None else "" for shape in found.shapes
        ],
        "next token": [_ms(shape.decode_bound_ms) for shape in found.shapes],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    output.print_table(list(shown), list(zip(*shown.values(), strict=True)), right=range(len(shown)))
    if found.quadratic_from is not None:
        output.say(f"From {found.quadratic_from:,} tokens on, attention's quadratic part is half of the blocks' work.")
    if found.device is not None:
        output.say(
            f"{found.device.name}: {found.device.flops_per_s / 1e9:,.0f} GFLOP/s, {found.device.bytes_per_s / 1e9:,.1f} GB/s."
        )


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f} ms"
