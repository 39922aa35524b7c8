"""The few pieces of HTML that a report is made of; every one takes plain text and escapes it."""

import base64
import html
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path

# Control characters are not allowed in HTML; a model may write them: ␀ for NUL, and so on.
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
VISIBLE |= {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

STYLE = """
:root { color-scheme: light dark; --line: #d4d4d8; --soft: #f4f4f5; --pale: #63636b; }
@media (prefers-color-scheme: dark) { :root { --line: #44444c; --soft: #26262b; --pale: #a8a8b3; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
@media (prefers-color-scheme: light) { body { background: #fff; color: #1b1b1f; } }
@media (prefers-color-scheme: dark) { body { background: #18181b; color: #ececf1; } }
h1 { margin-bottom: 0; }
h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
nav a { margin-right: 1rem; }
@media (prefers-color-scheme: dark) { a { color: #8ab4f8; } }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: 0.25rem 1rem 0.25rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--pale); overflow-wrap: normal; }
tbody th { font-weight: 500; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
figure { margin: 2rem 0; break-inside: avoid; }
figcaption, footer { color: var(--pale); font-size: 0.9rem; }
img { background: #fff; border-radius: 6px; height: auto; max-width: 100%; }
pre { background: var(--soft); border-radius: 6px; font-size: 0.85rem; overflow-wrap: anywhere;
  padding: 0.75rem; white-space: pre-wrap; }
@media print {
  nav { display: none; }
  body { background: #fff; color: #000; font-size: 11pt; max-width: none; }
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
    """A table of names and values; what has no value (None or an empty text) is left out."""
    shown = [(name, value) for name, value in rows if value is not None and value != ""]
    lines = [f'<tr><th scope="row">{text(n)}</th><td>{text(v)}</td></tr>' for n, v in shown]
    return "<table>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>" if lines else ""


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
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content.encode(errors="replace"))
    os.replace(aside, path)
    return path
