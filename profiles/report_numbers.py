"""Numbers as a report writes them: three significant digits, one unit a column, a dash where there is none."""

from __future__ import annotations

from compressor.profiles.report import MetricInfo

__all__ = [
    "NONE", "format_bytes", "format_count", "format_difference", "format_metric", "format_ms", "format_number",
    "format_ratio", "format_share", "sentence_case",
]  # fmt: skip

NONE = "–"


def format_number(value: float | None) -> str:
    """Three significant digits without exponent: 0.00123, 1.23, 12.3, 123, 1,234; below 0.0001 as 1.2e-05."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1e}" if abs(value) < 1e-4 else f"{value:#.3g}"


def format_ms(value: float | None) -> str:
    """Milliseconds, without the unit."""
    return format_number(value)


def format_count(value: float | None) -> str:
    """A count with k, M, G or T: 3.21 M."""
    return _scaled(value, ("", " k", " M", " G", " T"))


def format_bytes(value: float | None) -> str:
    """Bytes with decimal units: 12.3 MB is 12.3 million bytes."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def format_ratio(value: float | None) -> str:
    """A factor: 4.12×."""
    return NONE if value is None else f"{format_number(value)}×"


def format_share(value: float | None) -> str:
    """A share in percent: 46.7 %."""
    return NONE if value is None else f"{100 * value:.1f} %"


def format_metric(value: float | None, info: MetricInfo) -> str:
    """A figure of quality with its unit."""
    if value is None:
        return NONE
    if info.unit == "%":
        return f"{100 * value:.1f} %"
    return f"{format_number(value)} {info.unit}".strip()


def format_difference(value: float, info: MetricInfo) -> str:
    """A difference of a figure, with its sign: +0.4 points."""
    sign = "±" if value == 0 else "+" if value > 0 else "−"
    if info.unit == "%":
        points = f"{100 * abs(value):.1f}"
        return "±0.0 points" if points == "0.0" else f"{sign}{points} points"
    return f"{sign}{format_number(abs(value))} {info.unit}".strip()


def sentence_case(text: str) -> str:
    """A label as a heading: its first letter is a capital, the rest stays."""
    return text[:1].upper() + text[1:]


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    if value is None:
        return NONE
    index, scaled = 0, float(value)
    while abs(scaled) >= 999.5 and index < len(units) - 1:
        scaled, index = scaled / 1000, index + 1
    number = f"{scaled:.0f}" if index == 0 else format_number(scaled)
    return f"{number}{units[index]}"
