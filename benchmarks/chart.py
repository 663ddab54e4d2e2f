"""Line charts as SVG, with nothing but strings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 430, 330  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 44, 76  # margins in it
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart with any eyes (Okabe and Ito)
TICKS = 5


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart: lines over a logarithmic x, beginning with y = 0. Every line has the points (x, y) of one name."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side. The background is white, so that it is also readable on dark pages."""
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}"',
        '  font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate({number * WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    points = [point for line in panel.lines.values() for point in line]
    xs = sorted({x for x, _ in points})
    step = _round_up(max(y for _, y in points) / TICKS)
    top = step * TICKS
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return LEFT + 12 + (right - LEFT - 24) * math.log(x / xs[0]) / span, bottom - (bottom - TOP) * y / top

    parts = [_text(WIDTH / 2, 22, panel.title, size=14)]
    for tick in range(TICKS + 1):
        _, y = place(xs[0], tick * step)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick * step:.6g}", anchor="end"))
    for value in xs:
        x, _ = place(value, 0)
        parts += [f'<path d="M{x:.1f} {bottom}v5" stroke="#222"/>', _text(x, bottom + 19, f"{value:.2g}")]
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222"/>')
    parts.append(_text((LEFT + right) / 2, bottom + 38, panel.x_label))
    parts.append(f'<g transform="translate(14 {(TOP + bottom) / 2}) rotate(-90)">{_text(0, 0, panel.y_label)}</g>')
    for number, (name, line) in enumerate(panel.lines.items()):
        color = COLORS[number % len(COLORS)]
        placed = [place(*point) for point in line]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in placed]
        key = LEFT + number * (right - LEFT) / len(panel.lines)
        parts.append(f'<rect x="{key:.1f}" y="{HEIGHT - 21}" width="14" height="4" fill="{color}"/>')
        parts.append(_text(key + 19, HEIGHT - 14, name, anchor="start"))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _round_up(number: float) -> float:
    """The next of 1, 2, 2.5, 5 and their multiples by powers of ten."""
    power = 10.0 ** math.floor(math.log10(number))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= number)
