"""The HTML of a report or a comparison: one page, no scripts, nothing fetched."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from cupytron import chart
from cupytron.durable import replacing
from cupytron.printable import printable

Pairs = Sequence[tuple[str, str]]

STYLE = """
:root { color-scheme: light dark;
  --paper: #fcfcfb; --ink: #1c1e21; --soft: #5d646d; --rule: #e2e4e6; --panel: #f3f4f4;
  --train: #2a6fb0; --val: #b8500f; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171a; --ink: #e4e6e8; --soft: #9aa1a9; --rule: #2d3136; --panel: #1d2024;
  --train: #6cb0ee; --val: #f0935a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
h3 { font-size: .9rem; margin: 0 0 .35rem; color: var(--soft); font-weight: 600; }
h3 { overflow-wrap: anywhere; }
.subtitle, .notes { color: var(--soft); margin: .25rem 0 0; overflow-wrap: anywhere; }
.notes { padding-left: 1.1rem; }
section, figure { margin: 2.5rem 0 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: baseline; }
.key { color: var(--soft); font-size: .85rem; }
.key .swatch { display: inline-block; width: 1.75em; height: .75em; vertical-align: middle;
  margin-right: .4em; }
.legend { list-style: none; padding: 0; margin: 1.5rem 0 0; }
.legend .key { color: var(--ink); overflow-wrap: anywhere; }
.remark { color: var(--soft); font-size: .85rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1px; margin: 1.75rem 0 0;
  grid-template-columns: repeat(auto-fill, minmax(max(9rem, 22%), 1fr)); }
.figures div { box-shadow: 0 0 0 1px var(--rule); padding: .7rem .9rem; }
.figures dt, .figures .remark { color: var(--soft); font-size: .8rem; }
.figures dd { margin: 0; font-variant-numeric: tabular-nums; }
.figures .value { font-size: 1.35rem; line-height: 1.35; }
.phone { display: none; }
@media (max-width: 40rem) { .desk { display: none; } .phone { display: block; } }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .tag { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
svg path { fill: none; } .grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.line { stroke-width: 2; stroke-linejoin: round; }
.line.train { stroke: var(--train); } .line.val { stroke: var(--val); }
.line.raw { stroke: var(--train); stroke-width: 1; opacity: .45; }
.dot.train, .dot.raw { fill: var(--train); } .dot.val { fill: var(--val); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1.5rem; }
.row figure { display: flex; flex-direction: column; justify-content: space-between; }
.row .line { stroke-width: 1.5; }
pre { background: var(--panel); border-radius: 6px; padding: 1rem 1.1rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem; overflow-y: auto;
  font: .85rem/1.55 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tables { columns: 17rem; column-gap: 2rem; }
.tables > div { break-inside: avoid; margin-bottom: 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; font-weight: 400; padding: .2rem 0; vertical-align: top;
  border-top: 1px solid var(--rule); }
th { color: var(--soft); padding-right: 1rem; min-width: 7rem; overflow-wrap: anywhere; }
td { text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.wide th:first-child { min-width: 10rem; position: sticky; left: 0; background: var(--paper); }
.wide th + th { text-align: right; min-width: 5.25rem; }
.wide td, .wide th + th { padding: .2rem 0 .2rem .75rem; }
"""

# the page holds all that it needs: a browser is told to fetch nothing
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def text(value: str) -> str:
    """Any text as HTML; control characters, which HTML does not allow, are shown as escapes."""
    return escape(printable(value, keep="\n\t"))


def page(
    title: str,
    subtitle: str,
    figures: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
    body: Iterable[str],
    style: str = "",
) -> str:
    """The whole document; `body` is HTML, `style` more of a style sheet, all else is text."""
    tiles = [
        f'<div><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>'
        f'<dd class="remark">{text(remark)}</dd></div>'
        for name, value, remark in figures
    ]
    noted = "".join(f"<li>{text(note)}</li>" for note in notes)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)} - cupytron</title>",
        f"<style>{STYLE}{style}</style></head><body><main>",
        f'<h1>{text(title)}</h1><p class="subtitle">{text(subtitle)}</p>',
        f'<ul class="notes">{noted}</ul>' if notes else "",
        f'<dl class="figures">{"".join(tiles)}</dl>' if tiles else "",
        *body,
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def write(document: str, out: str | Path) -> None:
    """Write a page, with the folders above it."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(document.encode(errors="replace"))


def figure(
    title: str,
    series: Sequence[chart.Series],
    name: str,
    small: bool = False,
    remark: str = "",
    x_label: str = "step",
) -> str:
    """A chart with its title and, for more than one line, a legend; nothing if there is no point.

    A large chart is drawn twice, for a desktop and for a phone, so that its words can be read on both.

    Args:
        series: its lines, with names that the legend shows.
        name: a word that no other chart of the page has.
        small: whether it stands in a row with others.
        remark: what the reader has to know about the lines.
    """
    series = [s for s in series if s.points]
    if not series:
        return ""
    label = f"{title} by {x_label}"
    if small:
        drawings = [chart.svg(series, label, name, 290, 170, x_label)]
    else:
        sizes = {"desk": (880, 320), "phone": (360, 270)}
        drawings = [
            f'<div class="{kind}">{chart.svg(series, label, f"{name}-{kind}", *size, x_label)}</div>'
            for kind, size in sizes.items()
        ]
    keys = [_key(s, "span") for s in series]
    caption = f"<h2>{text(title)}</h2>{''.join(keys) if len(keys) > 1 else ''}"
    said = f'<p class="remark">{text(remark)}</p>' if remark else ""
    return f"<figure><figcaption>{caption}</figcaption>{said}{''.join(drawings)}</figure>"


def legend(series: Sequence[chart.Series]) -> str:
    """A list of lines that stand in several charts, whose names may be long."""
    return f'<ul class="legend">{"".join(_key(s, "li") for s in series)}</ul>'


def _key(series: chart.Series, element: str) -> str:
    return f'<{element} class="key">{_swatch(series)}{text(series.name)}</{element}>'


def _swatch(series: chart.Series) -> str:
    """A piece of a line, for the legend."""
    dot = f'<circle class="dot {series.style}" cx="14" cy="6" r="3"/>' if series.marks else ""
    path = f'<path class="line {series.style}" d="M0 6H28"/>'
    return f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">{path}{dot}</svg>'


def row(figures: Sequence[str]) -> str:
    """Small charts next to each other; those without points are left out."""
    figures = [drawn for drawn in figures if drawn]
    return f'<div class="row">{"".join(figures)}</div>' if figures else ""


def sample(content: str, remark: str) -> str:
    """Text that the model wrote, and how it came to write it."""
    said = f'<p class="remark">{text(remark)}</p>'
    return f"<section><h2>Sample</h2>{said}<pre>{text(content)}</pre></section>"


def tables(title: str, sections: Mapping[str, Pairs]) -> str:
    """A table of names and values for each section."""
    if not sections:
        return ""
    parts = []
    for name, pairs in sections.items():
        rows = [f"<tr><th>{text(key)}</th><td>{text(value)}</td></tr>" for key, value in pairs]
        heading = f"<h3>{text(name)}</h3>" if name else ""
        parts.append(f"<div>{heading}<table>{''.join(rows)}</table></div>")
    return f'<section><h2>{text(title)}</h2><div class="tables">{"".join(parts)}</div></section>'


def wide_table(title: str, head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with a column for each of several things, which a narrow page can scroll; "" without rows.

    The names of the rows stay in sight.
    """
    if not rows:
        return ""
    cells = "".join(f"<th>{text(name)}</th>" for name in head)
    lines = [f"<tr><th></th>{cells}</tr>"]
    for name, values in rows.items():
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        lines.append(f"<tr><th>{text(name)}</th>{cells}</tr>")
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f"<section><h2>{text(title)}</h2>{table}</section>"
