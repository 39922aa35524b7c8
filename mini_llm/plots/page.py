"""The few pieces of HTML that a report is made of; every one takes plain text and escapes it."""

import base64
import html
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from mini_llm.durable import write_whole

# Control characters are not allowed in HTML; a model may write them: ␀ for NUL, and so on.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
VISIBLE |= {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

STYLE = """
:root { color-scheme: light dark; --line: #d4d4d8; --soft: #f4f4f5; --pale: #63636b;
  --link: #0b66a8; background: #fff; color: #1b1b1f; }
@media (prefers-color-scheme: dark) { :root { --line: #3f3f46; --soft: #26262b; --pale: #a8a8b3;
  --link: #8ab4f8; background: #18181b; color: #ececf1; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem;
  overflow-wrap: anywhere; padding: 1rem; }
h1 { margin-bottom: 0; }
h2 { border-bottom: 1px solid var(--line); margin: 2.5rem 0 1rem; }
p { max-width: 60rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; }
.wide { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; overflow-wrap: break-word; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 1.5rem 0.25rem 0; text-align: left;
  vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
thead th, dt { color: var(--pale); }
tbody th { font-weight: 500; min-width: 9rem; }
td { max-width: 30rem; }
td.number, th.number { text-align: right; }
td.number, dd { font-variant-numeric: tabular-nums; }
dl { column-gap: 3rem; columns: 2 26rem; font-size: 0.9rem; margin: 1rem 0; }
dl div { border-bottom: 1px solid var(--line); break-inside: avoid; display: grid; gap: 1rem;
  grid-template-columns: minmax(0, 13rem) minmax(0, 1fr); padding: 0.25rem 0; }
dt, dd { margin: 0; }
.gallery { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 30rem), 1fr)); }
figure { break-inside: avoid; margin: 0; min-width: 0; }
figcaption, footer { color: var(--pale); font-size: 0.9rem; }
figcaption { margin-top: 0.5rem; }
img { background: #fff; border-radius: 6px; box-sizing: border-box; display: block; height: auto;
  max-width: 100%; padding: 0.5rem; }
@media (prefers-color-scheme: dark) { img { filter: brightness(0.9); } }
summary { cursor: pointer; }
pre { background: var(--soft); border-radius: 6px; font-size: 0.85rem; padding: 0.75rem;
  white-space: pre-wrap; }
footer { margin-top: 2.5rem; }
@media print {
  :root { background: #fff; color: #000; }
  nav { display: none; }
  body { font-size: 11pt; max-width: none; }
  img { filter: none; }
  pre { border: 1px solid #ccc; background: #fff; color: #000; }
}
"""


def text(value: object) -> str:
    """Any value as text of a page: escaped, control characters made visible."""
    shown = str(value).replace("\r\n", "\n").translate(VISIBLE)
    return html.escape(shown)


def paragraph(content: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{text(content)}</p>"


def block(content: str) -> str:
    """Text as it stands, its lines kept."""
    return f"<pre>\n{text(content)}</pre>"  # HTML drops the first line break of a pre


def folded(title: str, *parts: str) -> str:
    """Parts (HTML) that a reader opens."""
    return f"<details><summary>{text(title)}</summary>\n" + "\n".join(parts) + "\n</details>"


def facts(rows: Sequence[tuple[str, object]]) -> str:
    """A list of names and values; what has no value (None or an empty text) is left out."""
    shown = [(name, value) for name, value in rows if value is not None and value != ""]
    lines = [f"<div><dt>{text(n)}</dt><dd>{text(v)}</dd></div>" for n, v in shown]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>" if lines else ""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a head; the first cell of a row names it. Numbers stand on the right.

    Columns without any value (None or an empty text) are left out.
    """
    kept = [c for c in range(len(head)) if any(row[c] not in (None, "") for row in rows)]
    right = {
        c for c in kept if all(re.fullmatch(r"[\d.,%–-]*", text(row[c] or "")) for row in rows)
    }

    def look(column: int) -> str:
        return ' class="number"' if column in right else ""

    titles = "".join(f'<th scope="col"{look(c)}>{text(head[c])}</th>' for c in kept)
    lines = []
    for row in rows:
        shown = [text("" if row[c] is None else row[c]) for c in kept]
        cells = "".join(
            f"<td{look(c)}>{value}</td>" for c, value in zip(kept[1:], shown[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row">{shown[0]}</th>{cells}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<thead>\n<tr>{titles}</tr>\n</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def picture(path: Path, title: str, caption: str) -> str:
    """A PNG inside the page, with its size, so that nothing moves while it loads."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    encoded = base64.b64encode(content).decode()
    return (
        f'<figure id="{text(path.stem)}">\n<img src="data:image/png;base64,{encoded}" '
        f'alt="{text(title)}" width="{width}" height="{height}">\n'
        f"<figcaption>{text(title)}. {text(caption)}</figcaption>\n</figure>"
    )


def gallery(pictures: Sequence[str]) -> str:
    """Pictures (HTML), two side by side where a window is wide enough."""
    return '<div class="gallery">\n' + "\n".join(pictures) + "\n</div>" if pictures else ""


def page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[str]]], made: str) -> str:
    """A whole page without scripts and without anything from outside it.

    ``sections`` are (heading, parts in HTML); one without parts is left out. ``made`` is said at
    the end.
    """
    shown = [(heading, [part for part in parts if part]) for heading, parts in sections]
    shown = [(heading, parts) for heading, parts in shown if parts]
    links = " ".join(f'<a href="#{_anchor(h)}">{text(h)}</a>' for h, _ in shown)
    body = "\n".join(
        f'<section id="{_anchor(heading)}">\n<h2>{text(heading)}</h2>\n'
        + "\n".join(parts)
        + "\n</section>"
        for heading, parts in shown
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # a browser would ask for one otherwise
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{text(title)}</h1>\n{paragraph(lead)}\n<nav>{links}</nav>\n</header>\n"
        f"<main>\n{body}\n</main>\n<footer>{paragraph(made)}</footer>\n</body>\n</html>\n"
    )


def _anchor(heading: str) -> str:
    return "section-" + re.sub(r"[^a-z0-9]+", "-", heading.lower())


def write_page(path: Path, content: str) -> Path:
    """Write a page, which a reader sees whole, the old one or the new one; return ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.encode(errors="replace"))
    return path
