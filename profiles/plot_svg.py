"""Matplotlib figures as inline SVG that takes colours and fonts from the page; the same data give the same text."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CARD", "GRID", "INK", "MUTED", "SERIES", "inline_svg", "new_axes", "styled"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Stand-ins: colours that no plot means literally. Each becomes a CSS variable of the page.
INK, MUTED, GRID, CARD = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#01020{index}" for index in range(1, 7))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", CARD: "--card"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES, 1)
}

FONT_SIZE = 11.0
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compressor",
    "path.simplify": True,
    "font.size": FONT_SIZE,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 1.0,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function that draws, so that matplotlib's settings are the report's while it runs."""

    @functools.wraps(draw)
    def with_style(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return with_style


@styled
def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose units are the SVG's: ``width`` and ``height`` in pixels of the page at full size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    return figure, figure.subplots()


@styled
def inline_svg(figure: Figure, key: str, description: str) -> str:
    """Turn a figure into an ``<svg>`` element for an HTML page.

    Args:
        figure: Made by `new_axes`.
        key: Unique on the page; starts all ids of the drawing.
        description: What a reader who does not see it is told.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: (?:[\w.]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', lambda match: f"{match[1]}{key}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"#0[0-9a-f]{5}\b", lambda match: _colour(match[0]), svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><")
    size = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg {size[0] if size else ""} role="img" aria-label="{_attribute(description)}">'
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg).strip()


def _colour(value: str) -> str:
    return f"var({_VARIABLES[value]})" if value in _VARIABLES else value


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
