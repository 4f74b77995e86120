"""The page in a real browser: draws, says nothing in the console, fits a narrow screen, is live."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from example_run import make_run
from real_run import real_run

from metagrad_filter.monitor.examples import Examples
from metagrad_filter.monitor.page import report_html
from metagrad_filter.monitor.view import run_view

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
if BROWSER is None:
    pytest.skip("no Chromium is installed", allow_module_level=True)
assert BROWSER is not None

CHARTS = 11
EVIL = (
    "</script><script>document.title='broken'</script><img src=x onerror=document.title='broken'>"
)


def dump(address: str, profile: Path, *, dark: bool = False, milliseconds: int = 1500) -> str:
    """Returns the document after its scripts have run; fails on any message in the console."""
    assert BROWSER is not None
    finished = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={profile}",
            f"--timeout={milliseconds}",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = [line for line in finished.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    return finished.stdout


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return run_view(make_run(tmp_path_factory.mktemp("run")))


def write(path: Path, view) -> str:
    path.write_text(report_html(view))
    return path.as_uri()


@pytest.mark.parametrize("dark", [False, True])
def test_every_chart_and_table_is_drawn_without_a_word(view, tmp_path, dark):
    text = dump(write(tmp_path / "report.html", view), tmp_path / "profile", dark=dark)
    assert "<h1>Version 2 is acting; 25.0% of 196,608 windows kept so far. 1 alarm stands." in text
    assert text.count("<canvas") == CHARTS
    assert len(re.findall(r'class="plot" role="img" aria-label="[^"]{20,}"', text)) == CHARTS
    assert "▲ drift" in text and "✗ Not published: the two halves" in text
    assert "unreliable: split-half correlation 0.31" in text
    for part in (
        "hard top-k: +0.0214 ± 0.0052 ✓ chosen",
        "hard top-k: +0.0214 ± 0.0052 ✗ starves books (20.0% to 0.1%)",
        "version 1 as it runs: +0.0110 ± 0.0040",
        "Since block 383: The scores' distribution differs",
        "0.600 (0.550 to 0.650), version 2",
        "0.710 (0.600 to 0.800)",
        "cluster 0 (40.0%): label 0.300, effect +0.0102 ± 0.0020",
        "sign agreement 75%",
        "of training's gradients: 4.5k of 49.2k",
    ):
        assert part in text, part


def test_examples_are_drawn_as_text_and_as_lines(view, tmp_path):
    shown = json.loads(json.dumps(view))
    wave = [[0.0, 1.0, 0.5], [1e6, 2e6, -1e6]]
    shown["examples"] = {
        "version": 2, "origin": "labelled in round 2", "windows": 3,
        "high": [{"score": 1.5, "share": 1.0, "text": EVIL + "\n" + "x" * 2000}],
        "low": [{"score": -1.5, "share": 0.0, "series": wave, "length": 3}],
    }  # fmt: skip
    text = dump(write(tmp_path / "report.html", shown), tmp_path / "profile")
    assert "<img" not in text
    assert "x" * 1800 in text
    assert len(re.findall(r"<polyline points=", text)) == 2
    assert 'aria-label="channel 1, from -1M to 2M"' in text
    shown["examples"] = {"missing": "no version is published yet", "high": [], "low": []}
    text = dump(write(tmp_path / "report.html", shown), tmp_path / "profile")
    assert "There are no windows to show: no version is published yet." in text


def test_a_run_of_the_product_itself_is_drawn(tmp_path):
    run_dir = real_run(tmp_path / "run", blocks=128)
    shown = run_view(run_dir, examples=Examples(run_dir, 2))
    text = dump(write(tmp_path / "report.html", shown), tmp_path / "profile", dark=True)
    assert "Version 3 has fallen back to a uniform choice" in text
    assert "fallback: held-out loss 3.91" in text and "Windows with the lowest scores" in text


def test_an_empty_run_says_what_to_do(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    text = dump(write(tmp_path / "report.html", run_view(run_dir)), tmp_path / "profile")
    assert "No filter has run yet." in text and "<canvas" not in text
    shown = text.partition("<script")[0]
    assert "no drift monitor has run" in shown and "none stands" not in shown
    for part in ("iterate the filtered dataset", "Run a calibration round", "takes minutes"):
        assert part in text


def test_hostile_text_is_shown_and_does_nothing(view, tmp_path):
    evil = json.loads(json.dumps(view))
    evil["rounds"][2]["reason"] = evil["run"] = evil["versions"][0]["fallback"] = EVIL
    evil["rounds"][2]["verdict"] = evil["checks"][0]["kind"] = EVIL
    evil["checks"][0]["classes"][0]["name"] = EVIL
    evil["filters"]["train"]["alarms"]["standing"][0]["text"] = EVIL
    groups = evil["filters"]["train"]["groups"]
    groups[EVIL] = groups.pop("source")
    groups[EVIL][0]["label"] = EVIL
    text = dump(write(tmp_path / "report.html", evil), tmp_path / "profile")
    assert "<title>metagrad-filter: run</title>" in text
    assert "<img" not in text and html.escape(EVIL, quote=False) in text


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_screen(view, tmp_path, width):
    write(tmp_path / "report.html", view)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="report.html" style="width:{width}px;height:900px;border:0" onload="'
        "const page = this.contentDocument.documentElement; document.title = page.scrollWidth + "
        "'/' + page.clientWidth + '/' + page.querySelectorAll('canvas').length\"></iframe>"
    )
    text = dump(frame.as_uri(), tmp_path / "profile")
    found = re.search(r"<title>(\d+)/(\d+)/(\d+)</title>", text)
    assert found is not None
    scroll, client, charts = map(int, found.groups())
    assert scroll <= client <= width and charts == CHARTS


# Serves the page in a frame, beside an image that takes three seconds: a browser that dumps a
# document when everything is loaded waits for it. A second record is written meanwhile.
LIVE = """
import asyncio, sys, threading
import uvicorn
from pathlib import Path
from starlette.responses import HTMLResponse, Response
from example_run import make_record, write_records
from metagrad_filter.monitor.server import make_app

run_dir = Path(sys.argv[1])
write_records(run_dir, [make_record(0, 0)])
inner = make_app(run_dir, poll_seconds=0.2)
FRAME = '''<iframe src="/" style="width:900px;height:900px"></iframe><img src="/slow"><p></p>
<script>setInterval(() => { const page = document.querySelector("iframe").contentDocument;
  const status = page.querySelector("[role=status]"), title = page.querySelector("h1");
  if (status)
    document.querySelector("p").textContent = `${status.textContent}|${title.textContent}`;
}, 50);</script>'''

async def app(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/frame":
        return await HTMLResponse(FRAME)(scope, receive, send)
    if scope["type"] == "http" and scope["path"] == "/slow":
        await asyncio.sleep(1.5)
        write_records(run_dir, [make_record(0, 0), make_record(1, 0)])
        await asyncio.sleep(1.5)
        return await Response(b"", media_type="image/png")(scope, receive, send)

    async def framed(message):
        # The page refuses to be framed, except here.
        kept = [(k, v) for k, v in message.get("headers", []) if k != b"x-frame-options"]
        await send(message | ({"headers": kept} if "headers" in message else {}))

    await inner(scope, receive, framed)

server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
original = server.startup
async def startup(sockets=None):
    await original(sockets=sockets)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
server.startup = startup
server.run()
"""


def test_the_live_page_draws_again_when_the_run_changes(tmp_path):
    pytest.importorskip("uvicorn", reason="the live page needs metagrad-filter[monitor]")
    pytest.importorskip("starlette", reason="the live page needs metagrad-filter[monitor]")
    server = subprocess.Popen(
        [sys.executable, "-c", LIVE, str(tmp_path / "run")],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        address = f"http://127.0.0.1:{port}/frame"
        text = dump(address, tmp_path / "profile", milliseconds=20_000)
    finally:
        server.terminate()
        server.wait(20)
    assert re.search(r"<p>live · updated [^|]*\|No scorer is acting yet.*8,192 windows", text)
