"""The examples do what they say: an app over frames, a page in a browser, a program in C++."""

from __future__ import annotations

import functools
import http.server
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compressor.exporters.bundle import write_bundle
from tests.small_artifacts import classifier, digits, digits_classifier, digits_generator

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RIGHT = 0.9


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real digits: a classifier for two engines, and a one-step generator."""
    folder = tmp_path_factory.mktemp("digits")
    write_bundle(digits_classifier(folder / "looks"), folder / "classifier.zip")
    write_bundle(digits_classifier(folder / "openvino", engine="openvino"), folder / "openvino.zip")
    write_bundle(digits_generator(folder / "draws"), folder / "generator.zip")
    return folder


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload, no-any-return]


def unpack(bundle: Path, folder: Path) -> None:
    done = run(sys.executable, EXAMPLES / "unpack.py", bundle, folder)
    assert done.returncode == 0, done.stderr


# --- an app over frames ----------------------------------------------------------------------------------------------


def test_app_labels_every_frame_and_draws_the_time_over_it(bundles: Path, tmp_path: Path) -> None:
    pixels, labels = digits()
    (tmp_path / "frames").mkdir()
    for number in range(20):  # enlarged, as a camera would show them
        frame = Image.fromarray((pixels[2 * number + 1] * 255).astype(np.uint8)).resize(
            (80, 80), Image.Resampling.BICUBIC
        )
        frame.convert("RGB").save(tmp_path / "frames" / f"{number:02}-{labels[2 * number + 1]}.png")
    (tmp_path / "frames" / "notes.txt").write_text("no picture")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    app = EXAMPLES / "webcam" / "watch.py"
    done = run(
        sys.executable, "-c", code, app, bundles / "classifier.zip", tmp_path / "frames", "--out", tmp_path / "out"
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "False 0", done.stderr
    found = [re.fullmatch(r"\d+-(\d)\.png: (\d) \d+% \(\d+\.\d\d ms\)", line) for line in lines[:-1]]
    assert len(found) == 20 and all(found)
    assert np.mean([match[1] == match[2] for match in found if match]) >= RIGHT
    watched = Image.open(tmp_path / "out" / "00-1.png")
    assert watched.size == (240, 240)
    assert (np.asarray(watched)[:34].max(axis=2) > 200).any(), "white letters on the bar"


def test_app_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    done = run(sys.executable, EXAMPLES / "webcam" / "watch.py", tmp_path / "none.zip", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "none.zip is no file" in done.stderr


def test_unpacked_bundle_is_plain_files(bundles: Path, tmp_path: Path) -> None:
    unpack(bundles / "openvino.zip", tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "classifier.xml", "classifier.bin", "model.json", "model.txt",
    }  # fmt: skip
    lines = (tmp_path / "a" / "model.txt").read_text().splitlines()
    assert lines[:4] == ["graph classifier.xml", "mean 0.5", "std 0.5", "shape 1 8 8"]
    assert lines[4:] == [f"label {digit}" for digit in range(10)]
    (tmp_path / "bad.zip").write_bytes((bundles / "openvino.zip").read_bytes()[:-5])
    done = run(sys.executable, EXAMPLES / "unpack.py", tmp_path / "bad.zip", tmp_path / "b")
    assert done.returncode == 1 and not (tmp_path / "b").exists()


# --- a page ----------------------------------------------------------------------------------------------------------

PROBE = """<script type="module">
  const found = [];
  const seen = (text) => new Promise((resolve) => {
    const status = document.getElementById("status");
    const look = () => { if (status.textContent.includes(text)) { watch.disconnect(); resolve(); } };
    const watch = new MutationObserver(look);
    watch.observe(status, { childList: true });
    look();
  });
  const tell = (value) => fetch("/found", { method: "POST", body: JSON.stringify(value) });
  addEventListener("error", (event) => tell({ error: event.message }));
  addEventListener("unhandledrejection", (event) => tell({ error: String(event.reason) }));
  await seen("ready");
  for (const button of document.querySelectorAll("#generate button")) {
    button.click();
    await seen(`a ${button.textContent} generated`);
    found.push([button.textContent, document.querySelector("#labels li").textContent]);
  }
  document.getElementById("clear").click();
  await seen("cleared");
  const canvas = document.getElementById("picture");
  const { left, top, width, height } = canvas.getBoundingClientRect();
  for (let k = 1; k < 8; k++) {
    canvas.dispatchEvent(new PointerEvent("pointermove", {
      buttons: 1, clientX: left + width / 2, clientY: top + (height * k) / 8 }));
  }
  await seen("drawn");
  const light = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  tell({ found, drawn: light.filter((value, k) => k % 4 === 0 && value > 128).length,
    status: document.getElementById("status").textContent });
</script></body>"""


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, and keeps what the page tells."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.found: queue.Queue[dict[str, object]] = queue.Queue()


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm",
    }  # fmt: skip

    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        self.server.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def page(bundles: Path, tmp_path: Path) -> Iterator[Server]:
    """The page with its models and onnxruntime-web, served."""
    npm = shutil.which("npm")
    if BROWSER is None or npm is None:
        pytest.skip("no chromium" if BROWSER is None else "no npm to install onnxruntime-web with")
    folder = tmp_path / "page"
    shutil.copytree(EXAMPLES / "browser", folder, ignore=shutil.ignore_patterns("node_modules", "models"))
    installed = EXAMPLES / "browser" / "node_modules"
    if installed.is_dir():
        (folder / "node_modules").symlink_to(installed)
    else:
        install = [
            npm,
            "install",
            "--ignore-scripts",
            "--no-package-lock",
            "--fetch-retries=1",
            "--fetch-timeout=20000",
        ]
        try:
            subprocess.run(install, cwd=folder, check=True, capture_output=True, text=True, timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm cannot install onnxruntime-web: {' '.join(str(error.stderr).split())[-200:]}")
    for name in ("classifier", "generator"):
        unpack(bundles / f"{name}.zip", folder / "models" / name)
    html = folder / "index.html"
    html.write_text(html.read_text().replace("</body>", PROBE))
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_page_classifies_the_digits_that_it_generates(page: Server, tmp_path: Path) -> None:
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
        f"--user-data-dir={tmp_path / 'profile'}", f"http://127.0.0.1:{page.server_address[1]}/",
    ]  # fmt: skip
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told = page.found.get(timeout=60)
    finally:
        browser.terminate()
        browser.wait(timeout=20)
    assert "error" not in told, told
    found = told["found"]
    assert isinstance(found, list) and [asked for asked, _ in found] == list("0123456789")
    assert np.mean([answer.startswith(f"{asked}: ") for asked, answer in found]) >= RIGHT, found
    assert isinstance(told["drawn"], int) and told["drawn"] >= 6, "a line from top to bottom"
    assert "classified in" in str(told["status"])


# --- a program in C++ ------------------------------------------------------------------------------------------------


def sdk() -> Path | None:
    """The folder of OpenVINO's CMake files, where its package brings them with the headers."""
    openvino = pytest.importorskip("openvino")
    folder = Path(openvino.__file__).parent / "cmake"
    return folder if (folder.parent / "include").is_dir() and folder.is_dir() else None


def test_program_for_openvino_compiles_and_agrees_with_python(bundles: Path, tmp_path: Path) -> None:
    cmake, compiler = shutil.which("cmake"), shutil.which("g++") or shutil.which("clang++")
    if cmake is None or compiler is None:
        pytest.skip("no cmake or no C++ compiler")
    folder = sdk()
    if folder is None:
        pytest.skip("the installed OpenVINO has no headers")
    flags = [
        f"-DOpenVINO_DIR={folder}",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror -Wno-error=deprecated-declarations",
    ]
    for step in (["-S", EXAMPLES / "cpp", "-B", tmp_path / "build", *flags], ["--build", tmp_path / "build"]):
        done = run(cmake, *step)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    unpack(bundles / "openvino.zip", tmp_path / "model")
    pixels, labels = digits()
    picture = tmp_path / "digit.pgm"
    Image.fromarray((pixels[1] * 255).round().astype(np.uint8)).save(picture)
    program = tmp_path / "build" / "classify_openvino"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run(program, tmp_path / "model", picture, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    from compressor.runtimes import load

    expected = load(bundles / "openvino.zip", {"threads": 1})(picture)[:3]
    assert [line.split()[0] for line in lines[:3]] == [label.name for label in expected]
    assert float(lines[0].split()[1]) == pytest.approx(expected[0].probability, abs=2e-3)
    assert expected[0].name == str(labels[1]) and re.fullmatch(r"\d+\.\d{3} ms", lines[3])
    bad = run(program, tmp_path / "model", tmp_path / "none.pgm", env=environment)
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)


def test_program_for_tensorrt_is_left_out_unless_it_is_asked_for() -> None:
    lists = (EXAMPLES / "cpp" / "CMakeLists.txt").read_text()
    assert re.search(r"option\(WITH_TENSORRT .*OFF\)", lists)
    block = lists.partition("if(WITH_TENSORRT)")[2]
    assert "classify_tensorrt.cpp" in block and "classify_tensorrt.cpp" not in lists.partition("if(WITH_TENSORRT)")[0]


def test_unpack_of_any_classifier_names_its_labels(tmp_path: Path) -> None:
    write_bundle(classifier(tmp_path / "looks"), tmp_path / "x.zip")
    unpack(tmp_path / "x.zip", tmp_path / "a")
    facts = json.loads((tmp_path / "a" / "model.json").read_text())
    assert facts["labels"] == ["dark", "left", "bright"] and facts["driver"] == "predict"
    assert facts["graphs"]["classifier"]["inputs"][0]["dtype"] == "float32"
