"""The report: one HTML file about all devices of a folder, with its pictures inside, that asks nothing of a network.

python -m fastvit.benchmarks.report --check FILE opens one in a headless Chromium and says what is wrong with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from fastvit.figures import in_one_step

from . import browser, charts, report_parts, rows as rows_module
from .report_style import SCRIPT, SHEET
from .standings import devices

Row = Mapping[str, object]

NAME, DIGEST = "report.html", "rows"  # the file, and the name of the meta element that holds the digest of its rows

# The page may use what stands in it, and nothing else: a browser refuses every request.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

METHOD = (
    "Every provider runs the same mathematics with the same weights on the same input, and its result is held against "
    "fp64 first: a run that breaks the tolerance rule, or breaks, has no speed.",
    "Providers are timed in interleaved rounds in one process; times are medians, and a plain copy and the fastest "
    "arithmetic of the machine are measured between the rounds as its ceilings.",
    "Speed is a ratio to eager PyTorch: timm's model as a whole, torch.nn.functional for an op.",
)

LEGEND = (
    ("eager, fastvit", "median time of a call in milliseconds."),
    ("vs eager", "eager's time over fastvit's; above 1 fastvit is faster."),
    ("best other, vs it", "the fastest that is neither eager nor fastvit, and its time over fastvit's."),
    ("of ceiling", "models: share of the fastest arithmetic measured; ops: least time for the work over the time."),
    ("error ratio", "largest error against fp64 as a multiple of eager's own."),
    ("MiB", "memory that a call adds at its highest, fastvit's and eager's."),
    ("all", "every provider's speed as a multiple of eager's."),
)


def write(rows: Sequence[Row], folder: str | Path, digest: str) -> Path:
    """Write report.html into the folder in one step and return its path."""
    path = Path(folder) / NAME
    with in_one_step(path) as temporary:
        temporary.write_text(page(rows, digest), encoding="utf-8")
    return path


def page(rows: Sequence[Row], digest: str = "") -> str:
    """The whole document; all that comes from rows is escaped."""
    found = devices(rows)
    links = "".join(f'<a href="#{rows_module.stem(device)}">{escape(device)}</a>' for device in found)
    with charts.style():
        sections = "".join(report_parts.device(device, group) for device, group in found.items())
    legend = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in LEGEND)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="{DIGEST}" content="{escape(digest)}">\n<title>fastvit: benchmarks</title>\n'
        f"<style>{SHEET}</style>\n</head>\n<body>\n<h1>fastvit: benchmarks</h1>\n"
        f"<p>{' '.join(METHOD)}</p>\n<nav>{links}</nav>\n{sections}"
        f"<h2>What the columns say</h2>\n<dl>{legend}</dl>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at a report in a browser; 0 if nothing is wrong with it."""
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.report", description=__doc__)
    parser.add_argument("--check", metavar="FILE", required=True, help="the report to open in a headless Chromium")
    given = parser.parse_args(arguments)
    try:
        wrong = browser.faults(Path(given.check).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, browser.BrowserError) as error:
        wrong = [str(error)]
    for fault in wrong:
        print(f"report: {fault}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
