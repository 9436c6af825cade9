"""The page of `fastvit figures`: every figure with what it shows, and the models' costs as a table."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .terminal import printable

if TYPE_CHECKING:
    from fastvit.compute import Row

COLUMNS = ("model", "family", "height", "width", "parameters", "gmacs", "asked")
# figure -> title, and how it is read
_SECTIONS = {
    "rollout": (
        "Where the model looks",
        "Each image as the model sees it, and darkened where little of it reaches the class token by attention "
        "rollout through all layers (figures 6 and 14).",
    ),
    "distance": (
        "How far each head looks",
        "The distance in pixels between patches, weighted by attention, averaged over the images: one point for each "
        "head (figures 7 right and 11).",
    ),
    "positions": (
        "What positions are alike",
        "For each patch the cosine similarity of its position embedding to all others (figure 7 centre).",
    ),
    "filters": (
        "What the patch embedding sees",
        "Principal components of its filters, by falling variance (figure 7 left).",
    ),
    "compute": (
        "What an image costs",
        "Multiply-adds for one image, the products of attention included, and parameters, among the paper's ResNets, "
        "hybrids and Vision Transformers (tables 1 and 6; figure 5 without its accuracy).",
    ),
}
_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 800px; padding: 24px 16px 48px; background: #fff; color: #1f2328;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 40px 0 4px; padding-top: 16px; border-top: 1px solid #d0d7de; }
p { margin: 6px 0 14px; color: #59636e; }
img, object { display: block; width: 100%; max-width: 720px; height: auto; margin: 0 auto; }
object { height: 720px; }
a { color: #0059b3; }
.scroll { overflow-x: auto; margin-top: 20px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 12px; border-bottom: 1px solid #d0d7de; text-align: left; white-space: nowrap; }
th { color: #59636e; font-weight: 600; }
.number { text-align: right; }
tr.asked td { background: #fff3e6; font-weight: 600; }
"""


def cells(row: "Row") -> list[object]:
    """A row under COLUMNS, as a CSV has it."""
    return [row.name, row.family, row.height, row.width, row.parameters, row.gmacs, int(row.asked)]


def _shown(row: "Row") -> tuple[str, str, str, str, str]:
    """A row as readers want it: model, family, image, millions of parameters, GMACs."""
    size = f"{row.width} x {row.height}"
    return printable(row.name), row.family, size, f"{row.parameters / 1e6:.1f}", f"{row.gmacs:.3f}"


_HEADINGS = ("model", "family", "image", "parameters (M)", "GMACs")


def markdown(rows: "Sequence[Row]") -> str:
    """The rows as a Markdown table, those that were asked for in bold."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|---|---|---|---:|---:|"]
    for row in rows:
        shown = [text.replace("|", "\\|") for text in _shown(row)]
        lines.append(f"| {' | '.join(f'**{text}**' if row.asked else text for text in shown)} |")
    return "\n".join(lines) + "\n"


def page(
    name: str, images: int, suffix: str, written: Sequence[str], left_out: Mapping[str, str], rows: "Sequence[Row]"
) -> str:
    """An HTML page that lies beside the figures and needs nothing else.

    Args:
        name: of the model. images: how many it was shown. suffix: of the figures' files.
        written: the files beside the page. left_out: what is missing, and why.
    """
    title = html.escape(printable(name))
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>',
        f"<body>\n<h1>{title}</h1>",
        '<p>The figures of <a href="https://arxiv.org/abs/2010.11929">An Image is Worth 16x16 Words</a>, of this model '
        f"and {images} {'image' if images == 1 else 'images'}.</p>",
    ]
    for figure, (heading, caption) in _SECTIONS.items():
        parts.append(f"<h2>{heading}</h2>")
        if f"{figure}.{suffix}" not in written:
            parts.append(f"<p>Left out: {html.escape(left_out.get(figure, 'not drawn'))}.</p>")
            continue
        parts.append(f"<p>{caption}{_numbers(figure, written)}</p>\n{_picture(figure, suffix, heading)}")
        if figure == "compute":
            parts.append(_table(rows))
            missing = {label: why for label, why in left_out.items() if label not in _SECTIONS}
            if missing:
                reasons = "; ".join(dict.fromkeys(missing.values()))
                parts.append(f"<p>Not in the table: {html.escape(', '.join(missing))} ({html.escape(reasons)}).</p>")
    return "\n".join([*parts, "</body>\n</html>\n"])


def _numbers(figure: str, written: Sequence[str]) -> str:
    files = [file for file in written if file in (f"{figure}.csv", f"{figure}.md")]
    links = ", ".join(f'<a href="{file}">{file}</a>' for file in files)
    return f" As numbers: {links}." if links else ""


def _picture(figure: str, suffix: str, heading: str) -> str:
    file = f"{figure}.{suffix}"
    if suffix == "pdf":  # which no browser shows as an image
        return f'<object data="{file}" type="application/pdf"><a href="{file}">{file}</a></object>'
    return f'<a href="{file}"><img src="{file}" alt="{heading}"></a>'


def _table(rows: "Sequence[Row]") -> str:
    heading = "".join(f"<th{_kind(place)}>{text}</th>" for place, text in enumerate(_HEADINGS))
    lines = [f"<tr>{heading}</tr>"]
    for row in rows:
        shown = enumerate(map(html.escape, _shown(row)))
        asked = ' class="asked"' if row.asked else ""
        lines.append(f"<tr{asked}>{''.join(f'<td{_kind(place)}>{text}</td>' for place, text in shown)}</tr>")
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _kind(column: int) -> str:
    return ' class="number"' if column >= 2 else ""
