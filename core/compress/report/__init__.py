"""Renders report.json to a model card, to an HTML page, and to a page that compares several jobs. Needs no other data and no torch."""

from nightpress.core.compress.report.pages import (
    HTML_FILE,
    MARKDOWN_FILE,
    draw,
    largest_errors,
    render_comparison,
    render_html,
    render_markdown,
)

__all__ = [
    "HTML_FILE",
    "MARKDOWN_FILE",
    "draw",
    "largest_errors",
    "render_comparison",
    "render_html",
    "render_markdown",
]
