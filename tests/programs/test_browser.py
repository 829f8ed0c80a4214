"""The page of examples/browser in a real headless browser: it draws what torch draws."""

import contextlib
import functools
import http.server
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from support.generators import NAMES, exported
from support.runs import REPOSITORY

from distgan import cli, load_generator
from distgan.models import to_bytes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM or not shutil.which("npm"), reason="needs Chromium and npm")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The example's folder with onnxruntime-web in it."""
    folder = tmp_path_factory.mktemp("browser") / "browser"
    shutil.copytree(REPOSITORY / "examples" / "browser", folder, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "onnxruntime-web@1"]
    if subprocess.run(command, cwd=folder, timeout=300).returncode != 0:
        pytest.skip("npm cannot fetch onnxruntime-web")
    return folder


@contextlib.contextmanager
def served(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


@pytest.mark.parametrize(
    ("names", "channels", "size"), [((), 3, 32), (NAMES, 1, 32), ((), 4, (32, 48))], ids=["colour", "labels", "RGBA"]
)
def test_the_page_draws_what_torch_draws(page, tmp_path, names, channels, size):
    from playwright.sync_api import sync_playwright

    folder = exported(tmp_path / "g", names=names, channels=channels, size=size)
    assert cli.main(["export", str(folder), f"--onnx={page}/generator.onnx", "--overwrite"]) == 0
    complaints, asked = [], []
    with served(page) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(address)
        tab.wait_for_function("document.getElementById('status').textContent.includes('images in')", timeout=60_000)
        assert tab.is_visible("#of-class") is bool(names)
        first = tab.evaluate("drawn.then(({images}) => [...images])")
        tab.fill("#seed", "5")
        if names:
            tab.fill("#label", "2")
        tab.click("button")
        z, images = tab.evaluate("drawn.then(({z, images}) => [[...z], [...images]])")
        shown = tab.evaluate("[...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]")
        wide, high = tab.evaluate("[canvas.width, canvas.height]")
        browser.close()
    assert not complaints
    assert all(url.startswith((address, "data:")) for url in asked), asked
    assert images != first
    z = torch.tensor(z).view(64, 16)
    assert abs(float(z.mean())) < 0.1
    assert abs(float(z.std()) - 1) < 0.1
    with torch.no_grad():
        expected = load_generator(folder)(z, torch.full((64,), 2) if names else None)
    expected = to_bytes(expected).numpy().astype(int)
    difference = abs(np.array(images).reshape(expected.shape) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999
    drawn = np.array(images).reshape(expected.shape)
    _, _, height, width = drawn.shape
    assert (high, wide) == (8 * height, 8 * width)
    second = np.array(shown).reshape(high, wide, 4)[:height, width : 2 * width]
    if channels == 4:
        assert np.array_equal(second[..., 3], drawn[1, 3])
        opaque = drawn[1, 3] > 128  # the canvas keeps colours times opacity, in 8 bits
        assert abs(second[..., :3] - drawn[1, :3].transpose(1, 2, 0))[opaque].max() <= 2
    else:
        assert np.array_equal(second[..., 0], drawn[1, 0])
        assert (second[..., 3] == 255).all()
