"""A profile as a table, in a terminal or for a pipe, and as JSON has it; and in words what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .profile_lines import Line, Profile
from .table import NOISY

COLUMNS = ("op", "shape", "calls", "ms", "share", "GFLOP/s", "GB/s", "MB", "roof", "bound")
LEFT = 2  # of them aligned to the left
SMALL = 0.002  # share of a pass below which lines are one together
_DASH = "-"

LEGEND = (
    "ms: median of each call, summed over equal calls, on a GPU of their kernels alone.  share: of the pass.  "
    "MB: every tensor that goes in or comes out of a call, once; GFLOP/s: of its matrix products, GB/s: of these MB.  "
    "roof: the least time for that work, at the rates of a plain copy and matrix product measured in the same run, "
    "over the time; above 100% the tensors come from a cache, which is faster than a copy.  outside: Python, "
    "dispatcher, views and allocations, on a GPU the time without a kernel of these ops.  clock: the pass without a "
    "profiler."
)


def cells(profile: Profile) -> list[list[str]]:
    """The rows of the table: each op's, a GPU's kernels below their op, then the rest of the pass and its sum."""
    rows = []
    small = [line for line in profile.lines if line.seconds < SMALL * profile.total]
    for line in profile.lines[: len(profile.lines) - len(small)]:
        rows.append(_line(line, profile))
        for kernel in line.kernels:
            share = kernel.seconds / profile.total
            rows.append(_row(f"  {kernel.name}", "", f"{kernel.launches:g}", kernel.seconds, f"{share:.1%}"))
    if small:
        seconds, calls = sum(line.seconds for line in small), sum(line.calls for line in small)
        rows.append(_row(f"{len(small)} more", "", str(calls), seconds, f"{seconds / profile.total:.1%}"))
    rows.append(_row("outside", "", "", profile.outside, f"{profile.outside / profile.total:.1%}"))
    rows.append(_row("total", "", "", profile.total, "100.0%"))
    rows.append(_row("clock", "", "", profile.clock, ""))
    return rows


def _row(name: str, shape: str, calls: str, seconds: float, share: str, *rest: str) -> list[str]:
    return [name, shape, calls, f"{seconds * 1e3:.3f}", share, *rest, *[""] * (len(COLUMNS) - 5 - len(rest))]


def _line(line: Line, profile: Profile) -> list[str]:
    told = line_as_dict(line, profile)
    speeds = [_DASH if told[name] is None else f"{told[name]:.1f}" for name in ("gflops", "gbs")]
    moved = f"{line.bytes / 1e6:.1f}" if line.bytes else _DASH
    roof = _DASH if told["roof"] is None else f"{told['roof']:.0%}"
    rest = (*speeds, moved, roof, told["bound"] or _DASH)
    return _row(line.op, line.shape, str(line.calls), line.seconds, f"{told['share']:.1%}", *rest)


def plain(profiles: Sequence[Profile]) -> str:
    """One aligned line per row, cells without blanks."""
    lines = [["direction", "provider", *COLUMNS]]
    for profile in profiles:
        for row in cells(profile):
            name, *rest = row
            name = f"kernel:{name.strip()}" if name.startswith(" ") else name
            joined = "_".join(name.split())
            lines.append([profile.direction, profile.provider, joined, *(cell or _DASH for cell in rest)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(widths) - len(COLUMNS) + LEFT
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def rich_table(profile: Profile) -> Any:
    """A table for a terminal; the op that loses most time is bold, what is no op dim."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = "  ".join(filter(None, (profile.title, profile.provider, profile.note)))
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(COLUMNS):
        if number < LEFT:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    worst = worst_line(profile)
    marked = None if worst is None else _line(worst, profile)
    for row in cells(profile):
        style = "bold" if row == marked else "dim" if not row[1] else ""
        table.add_row(Text(row[0]), *row[1:], style=style)
    return table


def worst_line(profile: Profile) -> Line | None:
    """The line that loses most time against its roof."""
    return max(profile.lines, key=lambda line: line.lost(profile.roof), default=None)


def advice(profile: Profile) -> str:
    """Which op loses most time against its roof, or that more is lost outside of them."""
    worst, roof = worst_line(profile), profile.roof
    ideal = profile.total - sum(line.lost(roof) for line in profile.lines)
    least = f"with no op below its roof a pass would take {ideal * 1e3:.2f} of {profile.total * 1e3:.2f} ms"
    if worst is None or profile.outside > worst.lost(roof):
        return f"next: what is outside the ops, {profile.outside * 1e3:.2f} ms, more than any op loses; {least}"
    share, bound = worst.least(roof)[0] / worst.seconds, worst.least(roof)[1]
    state = f"at {share:.0%} of its roof, bound by {bound}" if bound else "which is no work by formula"
    lost, spent = worst.lost(roof) * 1e3, worst.seconds * 1e3
    return f"next: {worst.op} {worst.shape}, {lost:.2f} of {spent:.2f} ms lost, {state}; {least}"


def footnotes(profiles: Sequence[Profile]) -> list[str]:
    """For each profile what to do next, its note and its roof; and whether to trust them."""
    notes = []
    for profile in profiles:
        roof = f"roof {profile.roof.gflops:.0f} GFLOP/s, {profile.roof.gbs:.1f} GB/s"
        about = "; ".join(filter(None, (profile.note, roof)))
        notes.append(f"{profile.title}  {profile.provider} ({about}): {advice(profile)}")
    noise = max((profile.noise for profile in profiles), default=1.0)
    if noise >= NOISY:
        notes.append(f"passes differ by up to {noise:.1f}x: the machine is busy, and shares this noisy decide nothing")
    return notes


def as_dict(profile: Profile) -> dict[str, Any]:
    """A profile as JSON has it: milliseconds, rates and shares worked out."""
    told: dict[str, Any] = {
        "title": profile.title,
        "direction": profile.direction,
        "provider": profile.provider,
        "note": profile.note,
        "passes": profile.passes,
        "noise": profile.noise,
        "ceiling_gflops": profile.roof.gflops,
        "ceiling_gbs": profile.roof.gbs,
        "clock_ms": profile.clock * 1e3,
        "total_ms": profile.total * 1e3,
        "outside_ms": profile.outside * 1e3,
    }
    return {**told, "lines": [line_as_dict(line, profile) for line in profile.lines]}


def line_as_dict(line: Line, profile: Profile) -> dict[str, Any]:
    """A line's figures, None for one that its work does not have."""
    (least, bound), seconds = line.least(profile.roof), line.seconds
    return {
        "op": line.op,
        "shape": line.shape,
        "calls": line.calls,
        "ms": seconds * 1e3,
        "share": seconds / profile.total,
        "flops": line.flops,
        "bytes": line.bytes,
        "gflops": line.flops / seconds / 1e9 if line.flops and seconds else None,
        "gbs": line.bytes / seconds / 1e9 if line.bytes and seconds else None,
        "least_ms": least * 1e3,
        "lost_ms": line.lost(profile.roof) * 1e3,
        "roof": least / seconds if bound and seconds else None,
        "bound": bound or None,
        "kernels": [{"name": k.name, "launches": k.launches, "ms": k.seconds * 1e3} for k in line.kernels],
    }
