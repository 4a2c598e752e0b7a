"""The report page in a real browser: it fits a phone, and it draws."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compressor.profiles.report_html import render_html

from .test_report import full_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 390, 1200)
PROBE = """<script>addEventListener("load", () => {
  const widest = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre, svg"))
    .map(e => e.getBoundingClientRect().right).reduce((a, b) => Math.max(a, b), 0);
  parent.postMessage({width: innerWidth, page: document.documentElement.scrollWidth, widest: widest,
    drawn: [...document.querySelectorAll("svg")].every(s => s.getBoundingClientRect().height > 50),
    tables: [...document.querySelectorAll("section .scroll")].some(s => s.scrollWidth > s.clientWidth)}, "*");
});</script></body>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium to open the report with")


def dump(page: Path, profile: Path) -> str:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=4000",
        f"--user-data-dir={profile}", "--window-size=1300,900", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def test_the_page_never_scrolls_sideways_and_its_plots_are_drawn(tmp_path):
    page = re.sub(r"<meta http-equiv[^>]*>", "", render_html(full_report())).replace("</body>", PROBE)
    (tmp_path / "report.html").write_text(page)
    # A window cannot be as narrow as a phone; a frame can.
    frames = "".join(f'<iframe src="report.html" style="border:0;width:{w}px;height:800px"></iframe>' for w in WIDTHS)
    (tmp_path / "frames.html").write_text(
        "<script>const found = {}; addEventListener('message', e => {"
        f"found[e.data.width] = e.data; document.title = JSON.stringify(found)}})</script>{frames}"
    )
    answer = dump(tmp_path / "frames.html", tmp_path / "profile")
    match = re.search(r"<title>(.*?)</title>", answer)
    assert match, f"the page did not answer: {answer[:300]}"
    found = {int(width): measured for width, measured in json.loads(match[1]).items()}
    assert sorted(found) == sorted(WIDTHS)
    for width, measured in found.items():
        assert measured["page"] <= width and measured["widest"] <= width, f"{width} pixels: scrolls sideways"
        assert measured["drawn"], f"{width} pixels: a plot has no height"
        assert measured["tables"] == (width < 1000), f"{width} pixels: wide tables scroll in their own frame"
