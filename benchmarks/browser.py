"""A page in a headless Chromium: is it as wide as the screen, does it log errors, does it ask for anything?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (390, 768, 1280)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=8000",
)  # fmt: skip

# A window cannot be narrower than some hundred pixels, a frame can: the page is looked at through one for each width.
_FRAME = """<!doctype html><meta charset="utf-8"><pre id="said"></pre><script>
const said = [], page = {page};
const look = (width) => new Promise((done) => {{
  const frame = document.createElement("iframe");
  Object.assign(frame.style, {{ width: width + "px", height: "844px", border: 0 }});
  frame.srcdoc = page;
  frame.onload = () => {{
    const inside = frame.contentWindow, root = inside.document.documentElement;
    inside.document.querySelectorAll("details").forEach((part) => part.open = true);
    const all = [...inside.document.body.querySelectorAll("*")];
    const read = all.filter((part) => part.textContent.trim() && !part.closest("svg"));
    const least = Math.min(...read.map((part) => parseFloat(inside.getComputedStyle(part).fontSize)));
    const requests = inside.performance.getEntriesByType("resource").length;
    said.push({{ width, scroll: root.scrollWidth, requests, least }});
    frame.remove();
    done();
  }};
  document.body.append(frame);
}});
(async () => {{
  for (const width of {widths}) await look(width);
  document.getElementById("said").textContent = JSON.stringify(said);
}})();
</script>"""


class BrowserError(RuntimeError):
    """There is no browser, or it did not answer."""


def find() -> str | None:
    """The path of a Chromium, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def faults(page: str, widths: tuple[int, ...] = WIDTHS) -> list[str]:
    """What is wrong with a page, a sentence each: too wide, too small to read, an error in the console, a request.

    Raises:
        BrowserError: no Chromium is found, or it does not answer.
    """
    program = find()
    if program is None:
        raise BrowserError(f"no browser: install one of {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder) / "frame.html"
        quoted = json.dumps(page).replace("</", "<\\/")
        outer.write_text(_FRAME.format(page=quoted, widths=list(widths)), encoding="utf-8")
        command = [program, *_FLAGS, f"--user-data-dir={folder}/profile", "--enable-logging=stderr", "--v=0",
                   "--dump-dom", outer.as_uri()]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        except subprocess.TimeoutExpired:
            raise BrowserError(f"{program} did not answer in three minutes") from None
    return _read(done.stdout, done.stderr)


def _read(document: str, log: str) -> list[str]:
    found = re.search(r'<pre id="said">(.+?)</pre>', document, re.DOTALL)
    if found is None:
        raise BrowserError(f"the page was not drawn: {log.strip()[-500:]}")
    wrong = [f"console: {line}" for line in re.findall(r"CONSOLE\S*\] (.*)", log)]
    for seen in json.loads(unescape(found[1])):
        if seen["scroll"] > seen["width"]:
            wrong.append(f"at {seen['width']} pixels the page is {seen['scroll']} wide")
        if seen["requests"]:
            wrong.append(f"at {seen['width']} pixels it makes {seen['requests']} requests")
        if seen["least"] < 14:
            wrong.append(f"at {seen['width']} pixels some text is {seen['least']} pixels high")
    return wrong
