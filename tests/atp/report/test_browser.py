"""The report in a real browser: no message on the console, nothing out of sight, and text that can be read."""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_report import write_run

from atp.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
pytestmark = [pytest.mark.slow, needs_chromium]
# For each element with text of its own: the contrast of its colour with what lies behind it, by WCAG 2.
LOOK = """
<script>
const numbers = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
  v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => e === null ? [255, 255, 255, 1]
  : over(numbers(getComputedStyle(e).backgroundColor), behind(e.parentElement));
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  const page = document.documentElement.scrollWidth;
  const found = {least: 99, texts: 0, poor: [], hidden: [], page, window: innerWidth};
  for (const e of document.querySelectorAll("main, main *")) {
    const text = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join("").trim();
    if (!text || !e.getClientRects().length || ["STYLE", "SCRIPT"].includes(e.tagName.toUpperCase())) continue;
    const style = getComputedStyle(e), back = behind(e), svg = e instanceof SVGElement;
    const pair = [light(over(numbers(svg ? style.fill : style.color), back)), light(back)].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    found.texts += 1;
    found.least = Math.min(found.least, contrast);
    if (contrast < 4.5) found.poor.push([text.slice(0, 40), contrast]);
  }
  for (const e of document.querySelectorAll(".scroll"))
    if (e.scrollWidth > e.clientWidth + 1) found.hidden.push(e.innerText.slice(0, 60));
  top.document.body.innerHTML = "<pre>" + JSON.stringify(found).replace(/</g, "&lt;") + "</pre>";
});
</script>
</body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The text of the report of a whole run, with drawings, and of a script that looks at it."""
    path = write_report(write_run(tmp_path_factory.mktemp("browser") / "run"))
    text = path.read_text(encoding="utf-8")
    assert text.count("</body>") == 1 and "<svg" in text
    return text.replace("</body>", LOOK)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (400, "light")])
def test_the_report_in_a_browser(page, tmp_path, width, scheme):
    # A frame, since no window is narrower than 500 pixels.
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe style="width: {width}px" srcdoc="{html.escape(page)}"></iframe>', encoding="utf-8")
    options = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path}", f"--window-size={width},1600", "--dump-dom"),
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    )
    done = subprocess.run([CHROMIUM, *options, frame.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr[-2000:]
    (told,) = re.findall(r"<pre>(\{.*\})</pre>", done.stdout)
    found = json.loads(told.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["texts"] > 100 and found["poor"] == [] and found["least"] >= 4.5
    assert found["window"] == width and found["page"] <= width and found["hidden"] == []
