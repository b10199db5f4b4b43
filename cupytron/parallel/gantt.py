"""Pictures of a timeline, what each stage of a pipeline runs and when: as plain text and as SVG."""

import math
import string
from html import escape

from cupytron.chart import ticks
from cupytron.parallel.checker import Span, Timeline
from cupytron.parallel.schedules import Action

COLOURS = {"F": (91, 155, 222), "B": (242, 150, 72), "W": (112, 190, 104)}
IDLE = "#ececec"

# of the SVG, in pixels
LEFT, TOP, ROW, BOX = 72, 52, 34, 26
LETTER = 7.0  # width of a digit in a box, with its share of the margin
WIDTHS = (1100.0, 5000.0)  # of the time axis: the first, or up to the second so that numbers fit


def text(timeline: Timeline, width: int = 100) -> str:
    """A chart in ASCII: a line for each stage, time to the right, and a legend.

    An action is as wide as it is long: "B3   |" is backward of micro-batch 3. Where it just holds its
    label, the bar at its end is left out: "F0F1F2".

    Args:
        width: of the chart in characters, without its labels; more if actions' labels need more.
    """
    rows, chunks = _rows(timeline), _chunks(timeline)
    needed = _scale(timeline, [len(_label(s.action, chunks)) for s in timeline.spans])
    scale = max(needed, width / (timeline.total or 1.0))
    lengths = _typical(timeline)
    unit = min(lengths, default=1.0)
    if all(abs(length / unit - round(length / unit)) < 1e-6 for length in lengths):
        # whole columns for each action: with times such as 1, 2, 1 no edge is rounded
        scale = max(math.ceil(needed * unit - 1e-6), math.floor(scale * unit + 1e-6)) / unit
    zero, unlabelled = _zero(timeline), 0

    def column(time: float) -> int:
        return math.floor((time - zero) * scale + 0.5 + 1e-6)

    lines, last = [], column(max(span.end for span in timeline.spans))
    for stage, spans in rows.items():
        cells = ["."] * last
        for span in spans:
            first, room = column(span.start), column(span.end) - column(span.start)
            label = _label(span.action, chunks)
            if len(label) > room:  # B1 for B12 would be wrong
                unlabelled += 1
                label = label[:1]
            box = label.ljust(room)[:room]
            cells[first : first + room] = box[:-1] + "|" if box.endswith(" ") else box
        lines.append(f"stage {stage:<{len(str(max(rows)))}} |{''.join(cells)}")

    legend = [f"{kind} {word}" for kind, word in _words(timeline).items()]
    letters = f"a to {_letter(chunks - 1)}: chunks 0 to {chunks - 1}"
    legend += {1: [], 2: ["small letters: chunk 1"]}.get(chunks, [letters])
    legend += ["number: micro-batch", "dots: idle", f"1 column: {1 / scale:.4g}"]
    if unlabelled:
        legend.append(f"too short for a number: {unlabelled}")
    return "\n".join([*lines, "; ".join(legend)])


def _rows(timeline: Timeline) -> dict[int, list[Span]]:
    rows: dict[int, list[Span]] = {stage: [] for stage in sorted({s.stage for s in timeline.spans})}
    for span in sorted(timeline.spans, key=lambda s: s.start):
        rows[span.stage].append(span)
    return rows


def _chunks(timeline: Timeline) -> int:
    return 1 + max(span.action.chunk for span in timeline.spans)


def _zero(timeline: Timeline) -> float:
    """Measured times may be those of any clock."""
    return min(span.start for span in timeline.spans)


def _typical(timeline: Timeline) -> list[float]:
    """How long actions take, without those so short that labels for them would blow up the chart."""
    lengths = [span.end - span.start for span in timeline.spans]
    least = sum(lengths) / len(lengths) / 4
    return [length for length in lengths if length >= least and length > 0]


def _scale(timeline: Timeline, letters: list[int]) -> float:
    """Letters for a unit of time, so that each action's label, if it is not too short, fits."""
    least = min(_typical(timeline), default=math.inf)
    sizes = [(n, s.end - s.start) for n, s in zip(letters, timeline.spans, strict=True)]
    return max((n / length for n, length in sizes if length >= least), default=0.0)


def _label(action: Action, chunks: int) -> str:
    """F3; of two chunks the second is f3, of more they are F3a, F3b, F3c."""
    if chunks == 2:
        return f"{action.kind.lower() if action.chunk else action.kind}{action.micro_batch}"
    return f"{action.kind}{action.micro_batch}{_letter(action.chunk) if chunks > 2 else ''}"


def _letter(chunk: int) -> str:
    again, letter = divmod(chunk, 26)
    return string.ascii_lowercase[letter] * (again + 1)


def _words(timeline: Timeline) -> dict[str, str]:
    """What the kinds that there are stand for."""
    kinds = {span.action.kind for span in timeline.spans}
    backward = "gradients of activations" if "W" in kinds else "backward"
    words = {"F": "forward", "B": backward, "W": "gradients of weights"}
    return {kind: word for kind, word in words.items() if kind in kinds}


def svg(timeline: Timeline, title: str = "") -> str:
    """The chart as a self-contained SVG: each action a box in its colour, later chunks lighter.

    The box of an action tells on a pointer's touch what it is and when.
    """
    rows, chunks, words = _rows(timeline), _chunks(timeline), _words(timeline)
    numbers = [len(str(span.action.micro_batch)) for span in timeline.spans]
    narrow, wide = WIDTHS
    width = min(max(narrow, LETTER * _scale(timeline, numbers) * timeline.total), wide)
    scale, zero = width / (timeline.total or 1.0), _zero(timeline)
    bottom = TOP + ROW * len(rows)
    size = f'width="{LEFT + width + 24:.0f}" height="{bottom + 44}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
        f'viewBox="0 0 {LEFT + width + 24:.0f} {bottom + 44}" role="img" '
        f'aria-label="{escape(title or "Pipeline schedule")}" font-family="sans-serif" '
        'font-size="12" fill="#222222">',
        '<rect class="page" width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
        *_legend(timeline, words, chunks),
    ]
    for row, (stage, spans) in enumerate(rows.items()):
        top = TOP + ROW * row
        parts.append(f'<text x="8" y="{top + 17}">stage {stage}</text>')
        parts.append(_rect("idle", LEFT, top, width, BOX, IDLE) + "/>")
        for span in spans:
            kind, micro_batch, chunk = span.action
            start, length = span.start - zero, span.end - span.start
            x, box = LEFT + start * scale, length * scale
            what = f"stage {stage}: {words[kind]}, micro-batch {micro_batch}"
            what += f", chunk {chunk}" if chunks > 1 else ""
            hint = f"<title>{what}; from {start:.6g} to {start + length:.6g}</title>"
            colour = _shade(kind, chunk, chunks)
            parts.append(_rect("action", x, top, box, BOX, colour) + f">{hint}</rect>")
            if box >= LETTER * len(str(micro_batch)):
                # a touch on the number is one on its box
                place = f'x="{x + box / 2:.2f}" y="{top + 17}" text-anchor="middle"'
                parts.append(
                    f'<text {place} font-size="11" pointer-events="none">{micro_batch}</text>'
                )
    return "\n".join([*parts, *_axis(timeline.total, scale, width, bottom), "</svg>"])


def _rect(name: str, x: float, y: float, width: float, height: float, colour: str) -> str:
    """An element that is not closed yet."""
    # a line between equal neighbours, thin enough to leave something of a narrow box
    line = f' stroke="#ffffff" stroke-width="{min(1.0, width / 4):.2f}"' * (name == "action")
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect class="{name}" {place} fill="{colour}"{line}'


def _shade(kind: str, chunk: int, chunks: int) -> str:
    white = 0.65 * chunk / chunks
    return "#" + "".join(f"{round(c + (255 - c) * white):02x}" for c in COLOURS[kind])


def _legend(timeline: Timeline, words: dict[str, str], chunks: int) -> list[str]:
    which = f", chunks 0 to {chunks - 1}" if chunks > 1 else ""
    entries = [(w + which, [_shade(k, c, chunks) for c in range(chunks)]) for k, w in words.items()]
    entries.append((f"idle ({timeline.bubble:.1%})", [IDLE]))
    parts, x = [], float(LEFT)
    for word, colours in entries:
        for colour in colours:
            parts.append(_rect("key", x, 30, 12, 12, colour) + "/>")
            x += 12
        parts.append(f'<text x="{x + 5:.0f}" y="40">{word}</text>')
        x += 6.4 * len(word) + 22
    return parts


def _axis(total: float, scale: float, width: float, bottom: int) -> list[str]:
    """A line with round times, about 100 pixels apart."""
    times = ticks(0.0, total, total * scale / 100) if total else [0.0]
    line = f'<path d="M{LEFT} {bottom}H{LEFT + width:.2f}'
    marks = [(LEFT + time * scale, time) for time in times]
    line += "".join(f"M{x:.2f} {bottom}v5" for x, _ in marks) + '" stroke="#222222" fill="none"/>'
    labels = [
        f'<text x="{x:.2f}" y="{bottom + 18}" text-anchor="middle">{t:.6g}</text>' for x, t in marks
    ]
    return [line, *labels, f'<text x="{LEFT}" y="{bottom + 36}">time</text>']
