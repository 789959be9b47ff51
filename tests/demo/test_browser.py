"""The folder of the demo in the browser and its server, without a browser."""

from __future__ import annotations

import http.client
import json
import threading

import numpy as np
import pytest

import skipstep
from skipstep.demo import browser
from skipstep.errors import InputError, MissingDependencyError


@pytest.fixture
def packages(tmp_path):
    """A node_modules with files of the runtime's names."""
    dist = tmp_path / "packages" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name in browser.RUNTIME:
        (dist / name).write_text(name)
    return tmp_path / "packages"


@pytest.mark.slow
def test_the_folder_holds_what_the_page_asks_for(packages, tmp_path, capsys):
    browser.main(["--packages", str(packages), "--out", str(tmp_path / "site"), "--only-write"])
    site = json.loads((tmp_path / "site" / "site.json").read_text())
    assert {"index.html", "app.js", "sampler.js", "style.css"} < {each.name for each in (tmp_path / "site").iterdir()}
    for plan in site["plans"]:
        assert (tmp_path / "site" / "graphs" / f"{plan['key']}.onnx").is_file()
        assert (tmp_path / "site" / "graphs" / f"{plan['key']}-inverted.onnx").is_file() == plan["inverted"]
    references = np.frombuffer((tmp_path / "site" / "references.bin").read_bytes(), np.uint8)
    references = references.reshape(len(site["plans"]), site["references"], 28, 28)
    with skipstep.load(browser.SHIPPED_BUNDLE, allow_hard_links=True, backend="onnxruntime") as engine:
        [last] = engine.sample(steps=50, seeds=[9], class_labels=[9], guidance_scale=2.0, output_type="pil")
    assert np.abs(references[-1, 9].astype(int) - np.asarray(last)).max() <= 1


def test_the_server_lets_a_page_share_memory_and_fetch_nothing_from_elsewhere(tmp_path):
    (tmp_path / "a.mjs").write_text("export default 1")
    (tmp_path / "a.wasm").write_bytes(b"\0asm")
    with browser.server(tmp_path) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        for name, kind in (("a.mjs", "text/javascript"), ("a.wasm", "application/wasm")):
            connection = http.client.HTTPConnection("127.0.0.1", serving.server_port, timeout=30)
            connection.request("GET", f"/{name}")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
            assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
            connection.close()
        with pytest.raises(InputError, match="cannot be used") as caught:
            browser.server(tmp_path, serving.server_port)
        assert "--port 0" in caught.value.remedy
        serving.shutdown()
        thread.join()
    with pytest.raises(InputError, match="port=70000"):
        browser.server(tmp_path, 70000)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(MissingDependencyError, match=r"ort.wasm.bundle.min.mjs") as caught:
        browser.write_site(tmp_path / "site", tmp_path)
    assert "make demo" in caught.value.remedy
    with pytest.raises(SystemExit, match="make demo"):
        browser.main(["--packages", str(tmp_path), "--out", str(tmp_path / "site")])
