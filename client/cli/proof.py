"""`nightpress compare` and `nightpress reproduce`: put reports side by side, and check a report by running its recipe again."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nightpress.client.cli import output
from nightpress.client.cli.exits import Exit
from nightpress.client.cli.press import allow_passes, read_data, require_core, run_here, write_job
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError
from nightpress.client.folders import read_model_folder
from nightpress.core.handoff.attestation import not_authentic, read_public_keys
from nightpress.core.handoff.compare import Comparison, compare
from nightpress.core.handoff.manifest import describe_file
from nightpress.core.handoff.report import REPORT_FILE, Report, read_report
from nightpress.core.handoff.reproduction import Reproduction, judge
from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR
from nightpress.core.handoff.verification import verify_report
from nightpress.core.recipes.models import parse_recipe

_EXITS = {"identical": Exit.OK, "equivalent": Exit.OTHER_BYTES, "different": Exit.OTHER_FIGURES}


def add_to(app: typer.Typer) -> None:
    app.command("compare", rich_help_panel="Results")(takes_session(compare_jobs))
    app.command("reproduce", rich_help_panel="This machine")(takes_session(reproduce))


def compare_jobs(
    session: Session,
    jobs: Annotated[
        list[str],
        typer.Argument(metavar="JOB...", help="Job ids, report.json files, or folders that hold a report.json."),
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="The quality figure to compare by, e.g. accuracy, or kl_divergence[code] of a slice."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the comparison as a page.")] = None,
) -> None:
    """Compare the artifacts of several jobs by size, quality and latency. Artifacts that another beats in everything are marked."""
    reports = _read_reports(session, jobs)
    found = compare(reports, metric)
    if html is not None:
        # Imported late: the template library is only needed for pages.
        from nightpress.core.compress.report import render_comparison

        html.write_text(render_comparison(reports, metric))
    if session.json:
        output.print_json(dataclasses.asdict(found))
    else:
        _print_comparison(found)
    if html is not None:
        output.note(f"Written: {html}")


def _read_reports(session: Session, names: Sequence[str]) -> list[Report]:
    local = {name: read_file(Path(name)) for name in names if Path(name).exists()}
    if len(local) == len(names):
        return list(local.values())
    with session.client() as client:
        return [local[name] if name in local else read_report(client.jobs.report(name).report) for name in names]


def read_file(path: Path) -> Report:
    """Read a report.json, or the report.json in a folder.

    Raises ClientError where there is no file, and NightpressError(invalid_request) where it is not a report.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    if not file.is_file():
        raise ClientError(f"There is no report at {file}.", hint="Name a report.json, or a folder that holds it.")
    return read_report(file.read_bytes())


def _print_comparison(found: Comparison) -> None:
    headers = ["", "size", *([found.metric] if found.metric else [])]
    if found.shape:
        headers.append(f"latency {found.shape[0]} × {found.shape[1]}")
    rows = []
    for point in found.points:
        row = [point.label, output.size_text(point.size_bytes)]
        if found.metric:
            ends = f" [{point.quality_low:.4g}, {point.quality_high:.4g}]" if point.quality_low is not None else ""
            row.append("–" if point.quality is None else f"{point.quality:.4g}{ends}")
        if found.shape:
            row.append("–" if point.latency_ms is None else f"{point.latency_ms:.1f} ms")
        rows.append([*row, f"beaten by {point.dominated_by}" if point.dominated_by else point.verdict])
    output.print_table([*headers, ""], rows, right=range(1, len(headers)))
    for note in found.notes:
        output.note(f"note {note}", "yellow")


def reproduce(
    session: Session,
    report: Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json, or a folder that holds it.")],
    model: Annotated[
        Path, typer.Option("--model", "-m", metavar="FOLDER", help="The source model.", exists=True, file_okay=False)
    ],
    data: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A data set that the recipe names; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the new result in this folder.")] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="FILE",
            help="First check the report's signed statement by these public keys, which `signing-keys --out` wrote.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Run a report's recipe again on this machine, and compare bytes and figures with the report."""
    before = read_file(report)
    statement = _statement_of(report, key)
    allow_passes()
    recipe = parse_recipe(before.recipe)
    sets = read_data(recipe, data or [])
    if out is not None and out.exists():
        raise typer.BadParameter(f"{out} exists.", param_hint="--out")
    require_core()
    threads = int(before.environment.get("threads") or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    with tempfile.TemporaryDirectory(prefix="nightpress-", dir=out.absolute().parent if out else None) as folder:
        job_dir = Path(folder)
        device = str(before.environment.get("device") or "cpu")
        spec = write_job(job_dir, read_model_folder(model), recipe, sets, device=device, threads=threads)
        if spec.model_digest != before.model.get("digest"):
            raise ClientError(
                f"{model} is not the model of the report: its digest is {spec.model_digest}, the report's {before.model.get('digest')}.",
                hint="Use exactly the same files: the same revision, with no file more or less.",
            )
        expected = {data_set.ref: data_set.sha256 for data_set in before.data}
        for name, file in spec.data.items():
            sha256 = describe_file(job_dir / DATA_DIR, job_dir / DATA_DIR / file).sha256
            if expected.get(name) not in {None, sha256}:
                raise ClientError(
                    f"The file given for {name} is not the report's: its SHA-256 differs.", hint="Use the same file."
                )
        run_here(job_dir, quiet=session.json)
        after = read_file(job_dir / OUT_DIR)
        if out is not None:
            (job_dir / OUT_DIR).replace(out)
    found = judge(before, after)
    if session.json:
        output.print_json(_as_dict(found) | {"statement": statement})
    else:
        _print_reproduction(found)
        if statement:
            output.say(
                f"The report and its figures are those of the statement for job {statement['job']}, signed by {statement['key']}."
            )
    raise typer.Exit(_EXITS[found.outcome])


def _statement_of(report: Path, key: Path | None) -> dict[str, str] | None:
    """The job and key of the signed statement that names a report; None if no key was given. Raises NightpressError(not_authentic)."""
    if key is None:
        return None
    file = report / REPORT_FILE if report.is_dir() else report
    signed = verify_report(file, read_public_keys(key.read_bytes()))
    if signed is None:
        raise not_authentic(f"no signed statement lies beside {file}")
    return {"job": str(signed.claims["job"]), "key": signed.key_id}


def _as_dict(found: Reproduction) -> dict[str, Any]:
    """The fields, with the properties that `asdict` leaves out."""
    tree = dataclasses.asdict(found)
    tree["bytes"] = [dataclasses.asdict(artifact) | {"same": artifact.same} for artifact in found.bytes]
    tree["figures"] = [
        dataclasses.asdict(figure) | {"same": figure.same, "within": figure.within} for figure in found.figures
    ]
    return tree


def _print_reproduction(found: Reproduction) -> None:
    for artifact in found.bytes:
        output.say(
            f"{artifact.artifact}: {'the same bytes' if artifact.same else 'other bytes'}",
            "green" if artifact.same else "yellow",
        )
    rows = []
    for figure in found.figures:
        ends = f"[{figure.low:.6g}, {figure.high:.6g}]" if figure.low is not None and figure.high is not None else ""
        outcome = "the same" if figure.same else "within" if figure.within else "OUTSIDE"
        after = "not measured" if figure.after is None else f"{figure.after:.6g}"
        rows.append([f"{figure.subject}: {figure.name} ({figure.data})", f"{figure.before:.6g}", ends, after, outcome])
    output.print_table(["", "report", "95% interval", "now", ""], rows, right=(1, 2, 3))
    for what, (then, now) in {**found.versions, **found.environment}.items():
        output.say(f"differs: {what} was {then or 'absent'}, is {now or 'absent'}", "yellow")
    if found.verdicts[0] != found.verdicts[1]:
        output.say(f"differs: the verdict was {found.verdicts[0]}, is {found.verdicts[1]}", "red")
    conclusion = {
        "identical": "Reproduced: the same bytes, and every figure in its interval.",
        "equivalent": "Reproduced except for the bytes: every figure lies in its interval.",
        "different": "Not reproduced: a figure lies outside its interval, or the verdict differs.",
    }
    output.say(conclusion[found.outcome], "red" if found.outcome == "different" else "green")
