"""report.json, and what is drawn from it alone: a model card, a page, and a page that compares several jobs. Nothing here needs torch."""

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
