"""The parts of the report's section on a device: headlines, pictures, tables, failures, what it was measured with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from . import charts, rows as rows_module, summary
from .pictures import PICTURES, SUMMARY, Picture
from .report_style import COLOURS
from .standings import Standing, ceilings, grouped, is_sound, number, order, provider, standings

Row = Mapping[str, object]

_OPEN = ("models", "roofline")  # pictures that are seen at once; the others open on a tap

# Column by column: its head, what stands in it, and the number it is sorted by.
_COLUMNS: tuple[tuple[str, Callable[[Standing], str], Callable[[Standing], float | None]], ...] = (
    ("eager ms", lambda s: summary.milliseconds(_ms(s.eager)), lambda s: _ms(s.eager)),
    ("fastvit ms", summary.ours_ms, lambda s: _ms(s.ours)),
    ("vs eager", lambda s: summary.cell(s.against_eager, ".2f", "x"), lambda s: s.against_eager),
    ("best other", lambda s: provider(s.peer) if s.peer else "-", lambda s: None),
    ("vs it", lambda s: summary.cell(s.against_peer, ".2f", "x"), lambda s: s.against_peer),
    ("of ceiling", lambda s: summary.cell(_of(s, "ceiling_share"), ".0%"), lambda s: _of(s, "ceiling_share")),
    ("error ratio", lambda s: summary.cell(_of(s, "error_ratio"), ".2f", "x"), lambda s: _of(s, "error_ratio")),
    ("MiB / eager's", lambda s: _memory(s), lambda s: _of(s, "peak_mib")),
)


def device(name: str, rows: Sequence[Row]) -> str:
    """Everything about one device, as HTML."""
    rows = sorted(rows, key=order)
    stem, found = rows_module.stem(name), standings(rows)
    models, ops = [s for s in found if not s.is_op], [s for s in found if s.is_op]
    parts = [f'<section id="{stem}">\n<h2>{escape(name)}</h2>\n', _headlines(models or ops), _overall(models, ops)]
    parts += [
        _picture(f"{stem}-{key}", picture, rows, key in _OPEN) for key, picture in PICTURES.items() if key != SUMMARY
    ]
    parts += [_table(f"{stem}-table-{what}", what, part) for what, part in (("models", models), ("ops", ops)) if part]
    return "".join([*parts, _failures(found), _machine(found, rows), "</section>\n"])


def _headlines(found: Sequence[Standing]) -> str:
    items = []
    for s in summary.models(found, summary.HEADLINES) or summary.ops(found, summary.HEADLINES):
        looks = ' class="failed"' if s.against_eager is None else ""
        big, _, rest = summary.verdict(s).partition(", ")
        items.append(f"<li{looks}>{escape(s.title)}<b>{escape(big)}</b><span>{escape(rest)}</span></li>")
    return f'<ul class="headlines">{"".join(items)}</ul>\n'


def _overall(models: Sequence[Standing], ops: Sequence[Standing]) -> str:
    said = [summary.overall(part, what) for part, what in ((models, "Whole models"), (ops, "Single ops")) if part]
    return "".join(f"<p>{escape(words)}.</p>\n" for words in said)


def _picture(name: str, picture: Picture, rows: Sequence[Row], seen: bool) -> str:
    panels = picture.drawn(rows)
    if not panels:
        return ""
    key = "".join(
        f'<li><i style="background: {_paint(colour)}"></i>{escape(text)}</li>' for text, colour in picture.key
    )
    figures = "".join(
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{_inline(panel, f'{name}-{number}-')}</figure>\n"
        for number, panel in enumerate(panels)
    )
    note = f'<p class="note">{escape(picture.note)}</p>'
    return (
        f'<details id="{name}"{" open" if seen else ""}><summary>{escape(picture.title)}</summary>\n'
        f'<ul class="key">{key}</ul>\n<div class="panels">\n{figures}</div>\n{note}\n</details>\n'
    )


def _inline(panel: charts.Panel, mark: str) -> str:
    """A chart as an element of the page: its colours the page's, its font too, its ids begin with the mark."""
    text = charts.alone(panel)
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r'(<svg\b[^>]*?)\s+width="[^"]*"\s*height="[^"]*"|<!--.*?-->', lambda m: m[1] or "", text, flags=re.DOTALL
    )
    text = re.sub(
        r'\s+xmlns(:xlink)?="[^"]*"|\s+version="1.1"|<g id="[^"]*"', lambda m: "<g" if m[0][0] == "<" else "", text
    )
    text = re.sub(r"font: (bold |700 |400 )?([\d.]+px) [^;\"]*", _font, text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{mark}\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{mark}\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{mark}\1"', text)
    text = re.sub(r"\n\s*", "\n", text)
    for name, light, _ in COLOURS:
        text = re.sub(re.escape(light) + r"\b", f"var(--{name})", text, flags=re.IGNORECASE)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(panel.title)}"', 1)


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}" + ("; font-weight: 600" if match[1] in ("bold ", "700 ") else "")


def _paint(colour: str) -> str:
    return next((f"var(--{name})" for name, light, _ in COLOURS if light == colour), colour)


def _table(name: str, what: str, found: Sequence[Standing]) -> str:
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(head)}</button></th>'
        for head in ("case", *(head for head, _, _ in _COLUMNS), "all, as multiples of eager")
    )
    lines = "".join(_line(s) for s in found)
    return (
        f'<h3>Every case: {what}</h3>\n<input type="search" data-filters="{name}" aria-label="Filter {what}" '
        f'placeholder="Filter: bfloat16, batch 8">\n<div class="scroll"><table id="{name}" data-sortable>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n"
    )


def _line(s: Standing) -> str:
    cells = [f"<td>{escape(s.title)}</td>"]
    for head, text, value in _COLUMNS:
        by, shown = value(s), text(s)
        sort = "" if by is None else f' data-v="{by:.6g}"'
        looks = ' class="failed"' if shown.isupper() and head == "fastvit ms" else ""
        if head in ("vs eager", "vs it") and by is not None and by > 1:
            looks = ' class="ahead"'
        cells.append(f"<td{sort}{looks}>{escape(shown)}</td>")
    every = ", ".join(f"{provider(row)} {_ratio(s, row)}" for row in s.rows if row["provider"] != "eager")
    return f'<tr>{"".join(cells)}<td class="text">{escape(every)}</td></tr>\n'


def _ratio(s: Standing, row: Row) -> str:
    return str(row["status"]) if row["status"] != "ok" else summary.cell(s.ratio(row), ".2f", "x")


def _ms(row: Row | None) -> float | None:
    return number(row, "median_ms") if is_sound(row) else None


def _of(s: Standing, column: str) -> float | None:
    return number(s.ours, column) if is_sound(s.ours) else None


def _memory(s: Standing) -> str:
    return f"{summary.cell(_of(s, 'peak_mib'), '.1f')} / {summary.cell(number(s.eager, 'peak_mib'), '.1f')}"


def _failures(found: Sequence[Standing]) -> str:
    failed = [(s, row) for s in found for row in s.failed]
    if not failed:
        return ""
    items = "".join(
        f'<li class="failed"><b>{escape(str(row["status"]))}</b> {escape(provider(row))}, {escape(s.title)}: '
        f"{escape(str(row.get('note') or 'no reason given'))}</li>\n"
        for s, row in failed
    )
    return f"<h3>Failed: no speed is shown</h3>\n<ul>{items}</ul>\n"


def _machine(found: Sequence[Standing], rows: Sequence[Row]) -> str:
    """The ceilings by dtype, and versions, commits and days."""
    lines = []
    for (dtype, _), part in grouped(found, lambda s: (s.dtype, s.is_op)).items():
        gflops, gbs = ceilings(row for s in part for row in s.rows)
        lines.append(
            f"<tr><td>{escape(dtype)}, {'ops' if part[0].is_op else 'models'}</td>"
            f"<td>{summary.cell(gflops, ',.0f')}</td><td>{summary.cell(gbs, ',.1f')}</td></tr>\n"
        )
    days = sorted({str(row.get("date") or "")[:10] for row in rows} - {""})
    seen = [("measured", [" to ".join(dict.fromkeys((days[0], days[-1])))] if days else [])]
    for column in ("eager", "torch", "triton", "timm", "python", "fastvit", "commit", "threads", "images"):
        seen.append((column, sorted({str(row.get(column) or "") for row in rows} - {""})))
    about = "".join(f"<dt>{name}</dt><dd>{escape(', '.join(values))}</dd>" for name, values in seen if values)
    return (
        '<h3>Ceilings measured, medians</h3>\n<div class="scroll"><table><thead><tr><th>arithmetic</th><th>GFLOP/s</th>'
        f"<th>copy GB/s</th></tr></thead>\n<tbody>\n{''.join(lines)}</tbody></table></div>\n"
        f"<h3>Measured with</h3>\n<dl>{about}</dl>\n{_notes(summary.notes(rows)[:-1])}"
    )


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>\n" for note in notes)
    return f"<h3>Notes of the runs</h3>\n<ul>{items}</ul>\n" if items else ""
