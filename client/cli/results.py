"""`nightpress pull` and `nightpress report`: what a job has made."""

import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

import typer

from nightpress.client.cli import output
from nightpress.client.cli.comparison import print_report
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.client import Client
from nightpress.client.errors import ApiError
from nightpress.core.errors import ErrorCode
from nightpress.core.wire.jobs import JobView

_FORMS: tuple[Literal["json", "html", "md"], ...] = ("json", "html", "md")
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


def add_to(app: typer.Typer) -> None:
    app.command("pull", rich_help_panel="Results")(takes_session(pull))
    app.command("report", rich_help_panel="Results")(takes_session(report))


def pull(
    session: Session,
    job: Annotated[
        str, typer.Argument(metavar="JOB|MODEL", help="A job's id, or a model's name: its newest accepted result.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to fill; otherwise ./JOB or ./MODEL.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", "-f", metavar="FORMAT", help="Only this artifact; may be repeated.")
    ] = None,
) -> None:
    """Fetch the artifacts and the report of a job, or of a model's newest accepted job. Every SHA-256 is checked; an interrupted fetch continues."""
    folder = out or Path(job)
    with session.client() as client:
        view = _job_or_latest(client, job)
        folders = fetch(client, view, folder, formats or [], quiet=session.json)
    if session.json:
        output.print_json(
            {
                "job": view.id,
                "verdict": view.verdict,
                "folder": str(folder),
                "artifacts": [str(path) for path in folders],
            }
        )
        return
    for artifact in folders:
        size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
        output.say(f"{artifact}  {output.size_text(size)}")
    if view.verdict == "rejected":
        output.note(
            "This result was rejected: it missed a gate of its recipe. report.md in that folder says which.", "yellow"
        )


def _job_or_latest(client: Client, reference: str) -> JobView:
    if not reference.startswith("job_"):
        reference = client.models.latest(reference).promotion.job_id
    return client.jobs.get(reference)


def fetch(client: Client, job: JobView, folder: Path, formats: list[str], *, quiet: bool) -> list[Path]:
    """Fetch artifacts to `folder`/<format>/ and the report beside them. Returns the artifacts' folders."""
    with output.transfer_meter("fetching", quiet=quiet) as meter:
        folders = client.jobs.download(job.id, folder, formats=formats, meter=meter)
    for form in _FORMS:
        try:
            report_file = client.jobs.report_file(job.id, form)
        except ApiError as error:
            if error.code != ErrorCode.NOT_FOUND:
                raise
        else:
            (folder / f"report.{form}").write_bytes(report_file)
    return list(folders)


def report(
    session: Session,
    job: JobArgument,
    open_page: Annotated[bool, typer.Option("--open", help="Open the whole report in a browser.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the whole report as one HTML page.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write it as a Markdown model card.")
    ] = None,
) -> None:
    """Print a job's figures before and after: size, quality with its interval, latency, throughput, memory."""
    with session.client() as client:
        view = client.jobs.report(job)
        if open_page and html is None:
            html = Path(tempfile.mkdtemp(prefix="nightpress-")) / "report.html"
        if html is not None:
            html.write_text(client.jobs.drawn_report(job, "html"))
        if markdown is not None:
            markdown.write_text(client.jobs.drawn_report(job, "md"))
    if session.json:
        output.print_json(view.report)
    else:
        print_report(view.report)
    for written in (html, markdown):
        if written is not None:
            output.note(f"Written: {written}")
    if open_page and html is not None and not webbrowser.open(html.resolve().as_uri()):
        output.note("No browser could be opened. Open the file yourself.", "yellow")
