"""Line charts without a library: as SVG for a page, and as plain text for a terminal."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from cupytron.printable import printable

Point = tuple[float, float]
MOST_POINTS = 1200  # in one line of an SVG; a run may have a million
MOST_MARKS = 60  # dots that touch each other say nothing
_TAG_HEIGHT = 12  # of a tag's text


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: what it shows, read out by screen readers.
        points: (x, y), finite, x rising.
        style: CSS class of the line; the page gives it a colour.
        marks: whether points get dots that tell their values; at most about MOST_MARKS get one.
        tag: a letter or two, drawn at the end of the line.
    """

    name: str
    points: Sequence[Point]
    style: str
    marks: bool = False
    tag: str = ""


def _text(value: str) -> str:
    """Any text as XML, which allows no control characters."""
    return escape(printable(value))


def finite(points: Iterable[tuple[object, object]]) -> list[Point]:
    """The points whose two values are finite numbers."""
    kept = []
    for x, y in points:
        if isinstance(x, int | float) and isinstance(y, int | float):
            # a Python integer can be too large for a float, and isfinite refuses it
            if abs(x) < 1e300 and abs(y) < 1e300:
                kept.append((float(x), float(y)))
    return kept


def smoothing_window(points: Sequence[Point], parts: int = 40) -> int:
    """How many points `smooth` averages, away from the ends; 1: it leaves the points as they are."""
    return 2 * (len(points) // parts) + 1


def smooth(points: Sequence[Point], parts: int = 40) -> list[Point]:
    """Mean over a window of about 2/parts of the points around each one (`smoothing_window`).

    The window shrinks evenly on both sides towards the start, so that a steep start is not dragged
    along, as an exponential average would. At the end only its right side shrinks, so that the last
    point alone does not decide where the line ends.
    """
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        left = min(i, len(points) // parts)
        right = min(left, len(points) - 1 - i)
        result.append((x, (sums[i + right + 1] - sums[i - left]) / (left + right + 1)))
    return result


def thin(points: Sequence[Point], limit: int = MOST_POINTS) -> list[Point]:
    """At most about `limit` points: the lowest and the highest of each stretch, so spikes stay."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Range of a vertical axis: all values, unless a few lie far above or below the rest."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low, high = ordered[last - round(last * 0.99)], ordered[round(last * 0.99)]
    room = 3 * (high - low)
    low, high = max(ordered[0], low - room), min(ordered[-1], high + room)
    largest = max(abs(high), abs(low))
    if high - low <= max(1e-12 * largest, 1e-290):
        pad = largest * 0.1 if largest > 1e-280 else 1.0  # one value, or a constant
        return low - pad, high + pad
    return low, high


def ticks(low: float, high: float, count: float, whole: bool = False) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten) from low to high, and at least two.

    Args:
        whole: only whole numbers; low and high are two different ones.
    """
    rough = (high - low) / max(1, count)
    while True:
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next((f for f in (1, 2, 5) if f * power >= 0.999 * rough), 10)
        step = max(step, 1.0) if whole else step
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last > first or (whole and step == 1.0):
            return [i * step for i in range(first, last + 1)]
        rough = step / 2.6  # the next smaller round step


def tick_label(value: float, step: float) -> str:
    """The value with as many digits as the distance between ticks asks for."""
    if value and (step < 1e-4 or abs(value) >= 1e7):
        places = math.floor(math.log10(abs(value))) - math.floor(math.log10(step) + 1e-9) + 1
        digits, _, exponent = f"{value:.{min(max(places, 2), 15)}g}".partition("e")
        return f"{digits}e{int(exponent)}" if exponent else digits
    return f"{value:,.{min(max(0, -math.floor(math.log10(step) + 1e-9)), 4)}f}"


def _spacing(values: Sequence[float]) -> float:
    return values[1] - values[0] if len(values) > 1 else 1.0


class _Frame:
    """Where values lie in the drawing, and its axes."""

    def __init__(self, series: Sequence[Series], width: int, height: int) -> None:
        points = [p for s in series for p in s.points]
        self.x0, self.x1 = min(x for x, _ in points), max(x for x, _ in points)
        # of numbers near 1e20, those that differ by one are equal as floats
        room = max(1.0, 1e-9 * max(abs(self.x0), abs(self.x1)))
        if self.x1 - self.x0 < room:
            # neither steps nor seconds are negative
            lowest = self.x0 - room if self.x0 < 0 else max(0.0, self.x0 - room)
            self.x0, self.x1 = lowest, self.x1 + room
        self.y0, self.y1 = bounds([y for _, y in points])
        self.height = height
        self.y_ticks = ticks(self.y0, self.y1, max(3, height // 60))
        spacing = _spacing(self.y_ticks)
        self.y_labels = [tick_label(value, spacing) for value in self.y_ticks]
        self.left = 14 + 7 * max(map(len, self.y_labels), default=0)
        longest = max(len(s.tag) for s in series)
        self.right, self.top, self.bottom = width - 12 - 9 * longest, 10, height - 36

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        place = self.top + (self.y1 - value) / (self.y1 - self.y0) * (self.bottom - self.top)
        # a spike leaves the frame, but by no more than a renderer can take
        return min(max(place, -self.height), 2.0 * self.height)

    def axes(self, x_label: str) -> list[str]:
        left, right, floor = self.left, self.right, self.bottom
        parts = []
        for value, text in zip(self.y_ticks, self.y_labels, strict=True):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<path class="axis" d="M{left} {floor}H{right}"/>')
        values = ticks(self.x0, self.x1, max(3, (right - left) // 130), whole=True)
        spacing = _spacing(values)
        for value in values:
            x, text = self.x(value), tick_label(value, spacing)
            parts.append(f'<path class="axis" d="M{x:.1f} {floor}v4"/>')
            # a label in the right corner would be cut off if it were centred
            anchor = "end" if x > right - 4 * len(text) else "middle"
            parts.append(f'<text x="{x:.1f}" y="{floor + 17}" text-anchor="{anchor}">{text}</text>')
        y = self.height - 4
        parts.append(f'<text x="{right}" y="{y}" text-anchor="end">{_text(x_label)}</text>')
        return parts


def svg(
    series: Sequence[Series],
    label: str,
    name: str,
    width: int = 880,
    height: int = 320,
    x_label: str = "step",
) -> str:
    """A chart as an SVG element that takes its colours from the page's style sheet.

    Args:
        series: drawn in order, the last on top; those without points are left out.
        label: what the picture is, for screen readers.
        name: a word that no other chart of the page has.
        width, height: of the drawing, in its own units; the page scales it.
        x_label: name of the horizontal axis.

    Returns: the element; nothing if there is no point.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    frame = _Frame(series, width, height)
    left, top = frame.left - 4, frame.top - 4
    size = f'width="{width - left}" height="{frame.bottom - top + 4}"'
    return "\n".join(
        [
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(label)}">',
            f'<clipPath id="{name}"><rect x="{left}" y="{top}" {size}/></clipPath>',
            *frame.axes(x_label),
            f'<g clip-path="url(#{name})">',
            *(part for s in series for part in _draw(s, frame, x_label)),
            "</g>",
            *_tags(series, frame),
            "</svg>",
        ]
    )


def _draw(series: Series, frame: _Frame, x_label: str) -> list[str]:
    points = thin(series.points)
    parts = []
    if len(points) > 1:
        path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
        parts.append(f'<path class="line {series.style}" d="M{path}"/>')
    # a single point would not show as a line
    if series.marks or len(points) == 1:
        for x, y in points[:: -(-len(points) // MOST_MARKS)]:
            hint = _text(f"{series.name}, {x_label} {x:,.0f}: {y:.4g}")
            place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"'
            title = f"<title>{hint}</title>"
            parts.append(f'<circle class="dot {series.style}" {place}>{title}</circle>')
    return parts


def _tags(series: Sequence[Series], frame: _Frame) -> list[str]:
    """Each line's tag at its end, moved up or down where it would cover another one."""
    ends = []
    for s in (s for s in series if s.tag):
        x, y = s.points[-1]
        # the end of a line that leaves the frame is at its edge
        ends.append((frame.x(x), min(max(frame.y(y), frame.top), frame.bottom), s))
    ends.sort(key=lambda end: end[0])
    parts, column = [], []
    for end, after in itertools.zip_longest(ends, ends[1:]):
        column.append(end)
        if after is None or after[0] - end[0] > 24:  # no tag is wider
            column.sort(key=lambda end: end[1])
            heights = _spread([y for _, y, _ in column], frame.bottom)
            for (x, _, s), y in zip(column, heights, strict=True):
                place = f'x="{x + 5:.1f}" y="{y + 4:.1f}"'
                parts.append(f'<text class="tag {s.style}" {place}>{_text(s.tag)}</text>')
            column = []
    return parts


def _spread(heights: Sequence[float], lowest: float) -> list[float]:
    """Rising heights at a tag's distance from each other, the last at most at `lowest`."""
    apart: list[float] = []
    for y in heights:
        apart.append(max(y, apart[-1] + _TAG_HEIGHT) if apart else y)
    for i, y in enumerate(reversed(apart)):
        apart[-1 - i] = min(y, lowest - i * _TAG_HEIGHT)
    return apart


def text_chart(lines: Sequence[tuple[str, Sequence[Point]]], width: int, height: int) -> str:
    """A chart in ASCII.

    Args:
        lines: (mark, points); later ones are drawn over earlier ones. A line whose mark is "*" is
            averaged over each column and drawn without gaps; others are single marks.
        width, height: of the plot in characters, without its axes.
    """
    xs = [x for _, points in lines for x, _ in points]
    x0, x1 = min(xs), max(xs)

    def column(x: float) -> int:
        return round((x - x0) / ((x1 - x0) or 1.0) * (width - 1))

    drawn = [
        (mark, _columns(points, column) if mark == "*" else [(column(x), y) for x, y in points])
        for mark, points in lines
    ]
    y0, y1 = bounds([y for _, cells in drawn for _, y in cells])
    grid = [[" "] * width for _ in range(height)]
    for mark, cells in drawn:
        before = None
        for c, y in cells:
            r = min(max(round((y1 - y) / (y1 - y0) * (height - 1)), 0), height - 1)
            top, end = r, r
            if mark == "*" and before is not None:
                # a steep part is drawn as a column of marks, so that the line hangs together
                top, end = min(r, before + 1), max(r, before - 1)
            for k in range(top, end + 1):
                grid[k][c] = mark
            before = r

    step = (y1 - y0) / max(1, height - 1)
    labels = {r: tick_label(y1 - r * step, step) for r in (i * (height - 1) // 3 for i in range(4))}
    margin = max(len(text) for text in labels.values())
    rows = [f"{labels.get(r, ''):>{margin}} |{''.join(cells)}" for r, cells in enumerate(grid)]
    rows.append(" " * margin + " +" + "-" * width)
    first, last = f"{x0:,.0f}", f"step {x1:,.0f}"
    rows.append(" " * (margin + 2) + first + last.rjust(width - len(first)))
    return "\n".join(row.rstrip() for row in rows)


def _columns(points: Sequence[Point], column: Callable[[float], int]) -> list[tuple[int, float]]:
    """Mean of the points of each column; columns between two points lie on the straight line."""
    sums: dict[int, list[float]] = {}
    for x, y in points:
        sums.setdefault(column(x), []).append(y)
    known = [(c, sum(ys) / len(ys)) for c, ys in sorted(sums.items())]
    filled = known[:1]
    for (c0, ya), (c1, yb) in itertools.pairwise(known):
        filled += [(c, ya + (yb - ya) * (c - c0) / (c1 - c0)) for c in range(c0 + 1, c1 + 1)]
    return filled
