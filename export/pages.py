"""HTML for the reports in a bundle: pages that need no other file and no network. Imports no torch."""

import html
import math

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;padding:.25em .8em;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}figure{display:inline-block;margin:.5em 1em .5em 0}
img{display:block;min-width:256px;image-rendering:pixelated}.note{color:#555}"""


def page(title: str, body: str) -> str:
    """A whole page with a body of HTML."""
    return (f'<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv="Content-Security-Policy" content="default-src '
            f"'none'; img-src data:; style-src 'unsafe-inline'\"><title>{text(title)}</title><style>{_STYLE}</style>\n"
            f"<body>{body}</body></html>\n")


def table(head: tuple, rows: list[tuple], numbers_from: int) -> str:
    """A table of plain values; the columns from `numbers_from` on are set as numbers."""
    body = "".join("<tr>" + "".join(f"<td{' class=n' if i >= numbers_from else ''}>{text(c)}" for i, c in enumerate(r)) for r in rows)
    return f"<table><tr>{''.join(f'<th>{text(h)}' for h in head)}{body}</table>"


def number(value: float) -> str:
    """Three digits of a number."""
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def text(value) -> str:
    """A value as text that is no HTML."""
    return html.escape(str(value))
