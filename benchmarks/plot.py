"""A PNG chart from benchmark rows: `python -m fastvit.benchmarks.plot ROWS.csv -o FILE.png`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastvit.figures import check_target, save

from . import rows as rows_module
from .table import batch_of, variant_of

Row = Mapping[str, object]

# Okabe and Ito's palette, told apart by readers with any colour vision; eager is grey because it is the yardstick
_COLOURS = {"eager": "#8c8c8c", "compile": "#E69F00", "fastvit": "#0072B2", "fastvit-reference": "#CC79A7"}
_OTHERS = {"fastvit-cpu": "#56B4E9", "fastvit-triton": "#009E73", "fastvit-cuda": "#D55E00"}
_NAMES = {"eager": "eager", "compile": "torch.compile", "fastvit": "fastvit"}
_BAR_INCHES, _TITLE_INCHES = 0.34, 0.62


class PlotError(ValueError):
    """There is nothing to draw."""


def draw(rows: Sequence[Row], path: str | Path) -> Path:
    """Draw images per second of every provider, one panel per model case, and write the file in one step.

    Each bar says its speed and its ratio to eager; whiskers span the 20th to the 80th percentile. A provider whose
    logits were wrong has no bar, only the word FAILED.

    Raises:
        PlotError: no rows. FigureError: matplotlib is missing, or an unknown suffix.
    """
    path = check_target(path)
    panels = _panels(rows_module.of_level(rows, rows_module.MODEL))
    if not panels:
        raise PlotError("no rows to draw")
    return save(_figure(panels), path)


def _panels(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by (device, model, dtype, batch, and what else sets them apart), in the order they come, eager first."""
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        name = (str(row["device"]), str(row["case"]), str(row["dtype"]), f"batch {batch_of(row)}", *variant_of(row))
        panels.setdefault(name, []).append(row)
    return {name: sorted(group, key=lambda row: row["provider"] != "eager") for name, group in panels.items()}


def _figure(panels: Mapping[tuple[str, ...], Sequence[Row]]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [_BAR_INCHES * len(group) + _TITLE_INCHES for group in panels.values()]
    header, footer = 0.6, 0.45
    figure = Figure(figsize=(7.6, sum(heights) + header + footer))
    FigureCanvasAgg(figure)
    total = figure.get_figheight()
    top = total - header
    devices = list(dict.fromkeys(name[0] for name in panels))
    figure.text(0.02, 1 - 0.28 / total, "Images per second", size=13, weight="bold", va="center")
    figure.text(
        0.02,
        1 - 0.54 / total,
        devices[0] if len(devices) == 1 else "several devices",
        size=9,
        color="#444444",
        va="center",
    )
    for (name, group), height in zip(panels.items(), heights, strict=True):
        inner = _BAR_INCHES * len(group)
        axes = figure.add_axes((0.19, (top - height + 0.16) / total, 0.78, inner / total))
        heading = " · ".join(name[1:] if len(devices) == 1 else (*name[1:], name[0]))
        _bars(axes, group, heading)
        top -= height
    figure.text(0.02, 0.18 / total, _caption(panels), size=7, color="#666666", va="center")
    return figure


def _bars(axes, group: Sequence[Row], heading: str) -> None:
    longest = max(max(_value(row, "images_per_s"), _whisker(row)[1]) for row in group) or 1.0
    for place, row in enumerate(group):
        speed, provider = _value(row, "images_per_s"), str(row["provider"])
        if row["status"] != "ok" or speed == 0.0:
            axes.text(longest * 0.01, place, f"{row['status']}: no speed shown", va="center", size=8.5, color="#B00020")
            continue
        slow, fast = _whisker(row)
        axes.barh(place, speed, height=0.72, color={**_COLOURS, **_OTHERS}.get(provider, "#F0E442"))
        axes.plot((slow, fast), (place, place), color="#222222", linewidth=1.2, solid_capstyle="butt")
        label = f"{_short(speed)}" + (f"   {_value(row, 'ratio'):.2f}×" if provider != "eager" else "")
        weight = "bold" if provider == "fastvit" else "normal"
        axes.text(max(speed, fast) + longest * 0.012, place, label, va="center", size=9, weight=weight)
    yardstick = _value(group[0], "images_per_s") if group[0]["provider"] == "eager" else 0.0
    axes.axvline(yardstick, color="#8c8c8c", linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    axes.set_yticks(
        range(len(group)), [_NAMES.get(str(row["provider"]), str(row["provider"])) for row in group], size=9
    )
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.22)
    axes.set_title(heading, loc="left", size=9.5, pad=4, weight="bold")
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color("#999999")


def _whisker(row: Row) -> tuple[float, float]:
    """Images per second at the 80th and at the 20th percentile of time."""
    times = [_value(row, column) for column in ("p80_ms", "p20_ms")]
    images = _value(row, "images_per_s") * _value(row, "median_ms")
    return (images / times[0], images / times[1]) if all(times) else (0.0, 0.0)


def _caption(panels: Mapping[tuple[str, ...], Sequence[Row]]) -> str:
    row = [row for group in panels.values() for row in group][-1]
    return (
        f"medians of interleaved rounds, whiskers 20-80 %; × = ratio to eager ({row['eager']}), "
        "shown only where the fp64 check is passed\n"
        f"torch {row['torch']} · fastvit {row['fastvit']} {row['commit']} · {str(row['date'])[:10]}"
    )


def _value(row: Row, column: str) -> float:
    value = row.get(column)
    return 0.0 if value in (None, "") else float(value)  # type: ignore[arg-type]


def _short(speed: float) -> str:
    return f"{speed:.2f}" if speed < 10 else f"{speed:.1f}" if speed < 100 else f"{speed:,.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read rows, draw them; 0 on success."""
    parser = argparse.ArgumentParser(prog="python -m fastvit.benchmarks.plot", description=__doc__)
    parser.add_argument("rows", help="CSV file written by `fastvit bench --csv`")
    parser.add_argument("-o", "--output", default="bench.png", help="PNG, SVG or PDF file (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        if not Path(given.rows).is_file():
            raise PlotError(f"{given.rows}: no such file")
        print(draw(rows_module.read(given.rows), given.output))
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
