"""Pages: what the reports share. Self-contained HTML, whose figures are SVG in the page's own font and colours."""

import io
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib as mpl
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

# Matplotlib draws with stand-ins for colours; the page's style sheet says what each is in light and in dark.
INK, MUTED = "#010101", "#020202"
COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)"}
STYLE: Any = {  # matplotlib types the names of all its parameters
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
    "svg.hashsalt": "batchnorm",  # the same results give the same page
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
NO_DATE = {"Date": None, "Creator": None, "Format": None, "Type": None}


def environment(package: str) -> Environment:
    """Return what renders a package's templates, and those that all share; values are escaped, none may be missing."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("batchnorm.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def svg(plot: Callable[[Figure], None], title: str, colours: dict[str, str], height: float = 3.8) -> str:
    """Return a plot as an SVG element for a page.

    Args:
        plot: draws it.
        title: said to those who do not see it.
        colours: the plot's own stand-ins, and what takes their place.
        height: in inches; all figures are equally wide.
    """
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        plot(figure)
        figure.savefig(buffer, format="svg", metadata=NO_DATE)
    text = buffer.getvalue()
    text = text[text.index("<svg ") :].replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    for stand_in, colour in {**COLOURS, **colours}.items():
        text = text.replace(stand_in, colour)
    return text
