"""What the report looks like and does: its style sheet, the colours of a light and a dark page, and its script."""

from . import charts

# The colours of the charts as custom properties: (name, drawn as, on a dark page).
COLOURS = (
    ("ink", charts.INK, "#e6edf3"),
    ("muted", charts.MUTED, "#9da7b1"),
    ("rule", charts.RULE, "#3a424b"),
    ("eager", charts.EAGER, "#a3a3a3"),
    ("ours", charts.OURS, "#56b4e9"),
    ("peer", charts.PEER, "#e69f00"),
    ("second", charts.SECOND, "#2bc198"),
    ("failed", charts.FAILED, "#ff8a80"),
    ("paper", "#ffffff", "#0d1117"),
    ("raised", "#f6f8fa", "#161b22"),
)


def _properties(place: int) -> str:
    return " ".join(f"--{colour[0]}: {colour[place]};" for colour in COLOURS)


SHEET = (
    f"""
:root {{ color-scheme: light dark; {_properties(1)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_properties(2)} }} }}
"""
    + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 23px; line-height: 1.25; margin: 40px 0 8px; padding-top: 16px; border-top: 2px solid var(--rule); }
h3 { font-size: 18px; margin: 28px 0 4px; }
p, ul { margin: 8px 0; max-width: 75ch; }
ul { padding-left: 20px; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0; }
nav a { padding: 9px 14px; border: 1px solid var(--rule); border-radius: 999px; color: var(--ink);
  text-decoration: none; min-height: 44px; display: inline-flex; align-items: center; }
.headlines { list-style: none; padding: 0; display: grid; gap: 10px; max-width: none;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.headlines li { background: var(--raised); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.headlines b { display: block; font-size: 26px; line-height: 1.2; color: var(--ours); }
.headlines span, .note { color: var(--muted); font-size: 14px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; padding: 0; font-size: 15px; }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }
.panels { display: grid; gap: 20px 28px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr));
  align-items: start; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; font-size: 15px; }
figure svg { display: block; width: 100%; height: auto; max-width: 400px; }
figure svg text { font-family: "DejaVu Sans", Verdana, system-ui, sans-serif; }
details { border-top: 1px solid var(--rule); margin-top: 12px; }
summary { cursor: pointer; padding: 12px 0; min-height: 44px; font-weight: 600; font-size: 18px; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; border: 1px solid var(--rule); border-radius: 8px;
  max-height: 80vh; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; font-variant-numeric: tabular-nums;
  white-space: nowrap; overflow-wrap: normal; min-width: 100%; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  white-space: normal; min-width: min(40vw, 300px); z-index: 1; }
thead th { position: sticky; top: 0; background: var(--raised); z-index: 2; padding: 0; }
thead th:first-child { z-index: 3; background: var(--raised); }
thead button { all: unset; box-sizing: border-box; cursor: pointer; padding: 8px 12px; min-height: 44px; width: 100%;
  font-weight: 600; display: flex; align-items: center; justify-content: flex-end; }
thead th:first-child button, thead th:last-child button { justify-content: flex-start; }
thead button:focus-visible { outline: 2px solid var(--ours); outline-offset: -2px; }
thead [aria-sort="ascending"] button::after { content: " ▲"; }
thead [aria-sort="descending"] button::after { content: " ▼"; }
tbody tr:last-child td { border-bottom: 0; }
td.text { text-align: left; color: var(--muted); }
td.ahead { font-weight: 600; color: var(--ours); }
td.failed, li.failed b { font-weight: 600; color: var(--failed); }
input { font: inherit; width: 100%; max-width: 420px; min-height: 44px; padding: 8px 12px; margin: 8px 0;
  color: inherit; background: var(--raised); border: 1px solid var(--rule); border-radius: 8px; }
dt { font-weight: 600; margin-top: 6px; }
dd { margin: 0; max-width: 75ch; }
"""
)

SCRIPT = """
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const value = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  table.tHead.querySelectorAll("button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, down = head.getAttribute("aria-sort") === "ascending";
    table.tHead.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => {
      const [x, y] = [value(a, column), value(b, column)], [m, n] = [parseFloat(x), parseFloat(y)];
      if (isNaN(m) || isNaN(n)) return isNaN(m) && isNaN(n) ? x.localeCompare(y) : isNaN(m) ? 1 : -1;
      return (m - n) * (down ? -1 : 1);
    };
    const rows = [...body.rows].sort(order);
    if (down && isNaN(parseFloat(value(rows[0], column)))) rows.reverse();
    body.append(...rows);
  }));
}
for (const input of document.querySelectorAll("input[data-filters]")) {
  const body = document.getElementById(input.dataset.filters).tBodies[0];
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(",").map((word) => word.trim());
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
"""
