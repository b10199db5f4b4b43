"""The HTML of a report: one page, no scripts, nothing fetched."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

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
.subtitle, .notes { color: var(--soft); margin: .25rem 0 0; }
.notes { padding-left: 1.1rem; }
section, figure { margin: 2.5rem 0 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1.25rem; align-items: baseline; }
.key { color: var(--soft); font-size: .85rem; }
.key i { display: inline-block; width: 1.1em; border-top: 3px solid; vertical-align: middle;
  margin-right: .4em; }
i.train { color: var(--train); } i.val { color: var(--val); }
i.raw { color: var(--train); opacity: .3; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1px;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 6px; overflow: hidden;
  margin: 1.75rem 0 0; }
.figures div { background: var(--paper); padding: .7rem .9rem; }
.figures dt, .figures .remark { color: var(--soft); font-size: .8rem; }
.figures dd { margin: 0; font-variant-numeric: tabular-nums; }
.figures .value { font-size: 1.35rem; line-height: 1.35; }
.wide { overflow-x: auto; } .wide svg { min-width: 34rem; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg path { fill: none; } .grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.line { stroke-width: 2; stroke-linejoin: round; }
.line.train { stroke: var(--train); } .line.val { stroke: var(--val); }
.line.raw { stroke: var(--train); stroke-width: 1; opacity: .3; }
.dot.train, .dot.raw { fill: var(--train); } .dot.val { fill: var(--val); }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1.5rem; }
.row .line { stroke-width: 1.5; } .row .wide svg { min-width: 0; }
pre { background: var(--panel); border-radius: 6px; padding: 1rem 1.1rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 30rem; overflow-y: auto;
  font: .85rem/1.55 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.tables { columns: 17rem; column-gap: 2rem; }
.tables > div { break-inside: avoid; margin-bottom: 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; font-weight: 400; padding: .2rem 0; vertical-align: top;
  border-top: 1px solid var(--rule); }
th { color: var(--soft); padding-right: 1rem; }
td { text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
"""


def text(value: str) -> str:
    """Any text as HTML; control characters, which HTML does not allow, are shown as escapes."""
    return escape(printable(value, keep="\n\t"))


def page(
    title: str,
    subtitle: str,
    figures: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
    body: Iterable[str],
) -> str:
    """The whole document; `body` is HTML, all else is text."""
    tiles = [
        f'<div><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>'
        f'<dd class="remark">{text(remark)}</dd></div>'
        for name, value, remark in figures
    ]
    noted = "".join(f"<li>{text(note)}</li>" for note in notes)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)} - cupytron</title>",
        f"<style>{STYLE}</style></head><body><main>",
        f'<h1>{text(title)}</h1><p class="subtitle">{text(subtitle)}</p>',
        f'<ul class="notes">{noted}</ul>' if notes else "",
        '<dl class="figures">',
        *tiles,
        "</dl>",
        *body,
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def figure(title: str, drawing: str, legend: Sequence[tuple[str, str]]) -> str:
    """A chart with its name and, for more than one line, a legend of (style, name)."""
    keys = [
        f'<span class="key"><i class="{style}"></i>{text(name)}</span>' for style, name in legend
    ]
    caption = f"<h2>{text(title)}</h2>{''.join(keys) if len(keys) > 1 else ''}"
    return f'<figure><figcaption>{caption}</figcaption><div class="wide">{drawing}</div></figure>'


def row(figures: Sequence[str]) -> str:
    """Small charts next to each other."""
    return f'<div class="row">{"".join(figures)}</div>' if figures else ""


def sample(content: str) -> str:
    """Text that the model wrote."""
    return f"<section><h2>Sample</h2><pre>{text(content)}</pre></section>"


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
