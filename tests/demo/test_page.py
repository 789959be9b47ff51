"""The demo's page in headless Chromium: the engine's pictures, by keyboard, at phone width, nothing from elsewhere."""

from __future__ import annotations

import threading

import chromium
import numpy as np
import pytest
from PIL import Image

import skipstep
from skipstep.calls.images import to_pil
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.demo.browser import server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.PROGRAM is None, reason="Chromium is not installed"),
    pytest.mark.timeout(900),
]
# As where the bundle of prompts is not there.
WITHOUT_PROMPTS = """
const real = fetch;
window.fetch = async (name, ...options) => {
  const answer = await real(name, ...options);
  if (name !== "site.json") return answer;
  const { prompted, ...site } = await answer.json();
  return new Response(JSON.stringify(site));
};
"""


@pytest.fixture(scope="module")
def address(site):
    with server(site) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}/"
        serving.shutdown()
        thread.join()


@pytest.fixture
def opened(address, tmp_path):
    """A page that has drawn its first picture, or says what is wrong."""
    pages = []

    def open_page(before="", said="#check", **options):
        page = chromium.Page(tmp_path / f"profile{len(pages)}", before=before)
        pages.append(page)
        page.open(address, **options)
        text(page, said)
        return page

    yield open_page
    for page in pages:
        page.__exit__()


def text(page, selector):
    """Its text once there is some; an error ends the wait."""
    page.wait(f"document.querySelector('{selector}').textContent || !document.querySelector('#error').hidden", 400)
    return page.evaluate(f"document.querySelector('{selector}').textContent")


def act(page, script, selector):
    """What the page says after `script`, where `selector` is."""
    page.evaluate(f"document.querySelector('{selector}').textContent = ''; {script}; 0")
    return text(page, selector)


def pixels(page, canvas):
    """Height, width and three colours; of a grey picture height and width."""
    script = "(c => [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"
    width, *values = page.evaluate(f"{script}(document.querySelector('{canvas}'))")
    found = np.array(values, np.uint8).reshape(-1, width, 4)[..., :3]
    return found if (found != found[..., :1]).any() else found[..., 0]


def click(selector):
    return f"document.querySelector('{selector}').click()"


def put(selector, value):
    changed = f"e.value = '{value}'; e.dispatchEvent(new Event('input', {{bubbles: true}}))"
    return f"(e => {{ {changed} }})(document.querySelector('{selector}'))"


@pytest.fixture(scope="module")
def engine():
    with skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, backend="onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def drawn(engine):
    def draw(steps, seed, label):
        given = {"seeds": [seed], "class_labels": [label], "guidance_scale": 2.0}
        return np.asarray(engine.sample(steps=steps, output_type="pil", **given)[0])

    return draw


def difference(a, b):
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_it_draws_what_make_sample_draws(opened, address, drawn):
    page = opened()
    said = page.evaluate("document.querySelector('#check').textContent")
    assert "same as the picture of make sample" in said
    assert difference(pixels(page, "#picture"), drawn(10, seed=0, label=0)) <= 1
    # A tuned plan, another class, and a seed that takes all 64 bits.
    page.evaluate(
        "document.querySelector('#plan').selectedIndex = 1; document.querySelector('#class').selectedIndex = 9"
    )
    act(page, put("#seed", 2**64 - 1) + ";" + click("#draw-one"), "#timing")
    text(page, "#check")
    assert difference(pixels(page, "#picture"), drawn(6, seed=2**64 - 1, label=9)) <= 1
    assert "6 evaluations of" in page.evaluate("document.querySelector('#timing').textContent")
    said = act(page, click("#draw-ten"), "#check")
    assert "same as the pictures of make sample" in said
    assert page.evaluate("document.querySelectorAll('#ten canvas').length") == 10
    # The ends of the arc are the pictures of the seeds.
    page.evaluate("document.querySelector('#class').selectedIndex = 3")
    assert "100 %" in act(page, put("#weight", 100), "#between-timing")
    assert difference(pixels(page, "#between-picture"), drawn(6, seed=3, label=3)) <= 1
    assert page.messages == []
    assert page.requests
    assert all(each.startswith((address, "data:,", f"blob:{address}")) for each in page.requests)
    assert page.evaluate("crossOriginIsolated")


def test_it_inverts_an_uploaded_picture(opened, tmp_path, engine, drawn):
    """To the noise that the engine finds, and draws it again as the engine does."""
    page = opened(before=WITHOUT_PROMPTS)
    assert page.evaluate("document.querySelector('#words').hidden")
    picture = drawn(10, seed=1, label=1)
    Image.fromarray(picture).resize((56, 56), Image.Resampling.NEAREST).save(tmp_path / "mine.png")
    page.evaluate(
        "document.querySelector('#class').selectedIndex = 1; document.querySelector('#negative').checked = false"
    )
    page.choose_file("#upload", tmp_path / "mine.png")
    said = text(page, "#invert-timing")
    assert "10 steps up and down" in said
    assert difference(pixels(page, "#given"), picture) <= 2
    image = pixels(page, "#given").astype(np.float32)[None, None] / 127.5 - 1
    noise = engine.invert(image, steps=10, class_labels=1).latents
    assert difference(pixels(page, "#noise"), np.asarray(to_pil(noise / 3)[0])) <= 1
    again = engine.sample(steps=10, x_T=noise, class_labels=1, output_type="pil")[0]
    assert difference(pixels(page, "#again"), np.asarray(again)) <= 1
    (tmp_path / "no.png").write_text("no picture")
    page.evaluate("document.querySelector('#invert-timing').textContent = ''")
    page.choose_file("#upload", tmp_path / "no.png")
    page.wait("!document.querySelector('#error').hidden")
    assert "no.png, which the browser cannot read" in page.evaluate("document.querySelector('#error').textContent")


def test_it_is_used_by_keyboard_and_told_to_a_screen_reader(opened, prompted):
    page = opened(width=390, dark=True)
    # Nothing is wider than the phone.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 22)"
    names = []
    for _ in range(7):
        page.press("Tab", 9)
        names.append(page.evaluate("document.activeElement.id"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert names == ["class", "seed", "plan", "guidance", "provider", "draw-one", "draw-ten"]
    page.evaluate("document.querySelector('#seed').focus(); document.querySelector('#seed').select()")
    page.send("Input.insertText", text="4")
    page.evaluate("document.querySelector('#check').textContent = ''")
    page.press("Enter", 13)
    assert "To compare" in text(page, "#check")
    # From the ten's button on to the prompt, which is longer than the text encoder reads.
    page.evaluate("document.querySelector('#draw-ten').focus()")
    page.press("Tab", 9)
    assert page.evaluate("document.activeElement.id") == "prompt"
    prompt = "a blue heart, a red apple and a cat, a dog and a crescent moon"
    page.evaluate("document.activeElement.select()")
    page.send("Input.insertText", text=prompt)
    page.press("Enter", 13)
    assert "10 evaluations of" in text(page, "#prompt-timing")
    assert "are cut off" in page.evaluate("document.querySelector('#prompt-cut').textContent")
    label = page.evaluate("document.querySelector('#prompt-picture').ariaLabel")
    assert label == f"{prompt}, seed 0, 10 steps"
    with skipstep.load(prompted, backend="onnxruntime") as engine:
        [picture] = engine.sample(prompt=prompt, steps=10, seeds=[0], guidance_scale=3.0, output_type="pil")
    assert difference(pixels(page, "#prompt-picture"), np.asarray(picture)) <= 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    told = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]}
    assert ("image", "t-shirt, seed 4, 10 steps") in told
    unnamed = [role for role, name in told if role in ("button", "combobox", "textbox", "slider", "image") and not name]
    assert unnamed == []
    # A seed that is none is refused where it stands.
    page.evaluate(put("#seed", 2**64) + ";" + click("#draw-one"))
    page.wait("document.querySelector('#seed').validationMessage")
    assert "18446744073709551615" in page.evaluate("document.querySelector('#seed').validationMessage")


def test_webgpu_draws_the_same(address, tmp_path, drawn):
    """On SwiftShader, Chromium's Vulkan driver without a GPU: slow, and the same shaders."""
    options = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
    with chromium.Page(tmp_path / "profile", gpu=True, options=(*options, "--use-vulkan=swiftshader")) as page:
        page.open(address)
        text(page, "#check")
        if page.evaluate("document.querySelector('#provider').options[1].disabled"):
            pytest.skip("this Chromium has no WebGPU")
        page.evaluate("document.querySelector('#provider').value = 'webgpu'")
        page.evaluate("document.querySelector('#plan').selectedIndex = 0")
        assert "same as the picture of make sample" in act(page, click("#draw-one"), "#check")
        assert difference(pixels(page, "#picture"), drawn(4, seed=0, label=0)) <= 1
        assert "WebGPU" in page.evaluate("document.querySelector('#runtime').textContent")
        assert any("asyncify" in each for each in page.requests)
        assert page.messages == []


@pytest.mark.parametrize(
    ("before", "said", "remedy"),
    [
        ("WebAssembly.validate = () => false", "without WebAssembly SIMD", "make sample"),
        ("WebAssembly.Memory = function () { throw new RangeError('out of memory') }", "too little memory", "Close"),
        (
            "const real = fetch; window.fetch = (n, ...o) => real(/onnx$/.test(n) ? 'gone.onnx' : n, ...o)",
            "404",
            "make demo",
        ),
        (
            "setInterval(() => { const choice = document.querySelector('#provider');"
            "if (choice) { choice.options[1].disabled = false; choice.value = 'webgpu' } })",
            "WebGPU does not run here",
            "Choose WebAssembly",
        ),
    ],
    ids=["no SIMD", "no memory", "no graph", "no WebGPU"],
)
def test_what_is_missing_is_said(opened, before, said, remedy):
    page = opened(before=before, said="#error")
    message = page.evaluate("document.querySelector('#error').innerText")
    assert said in message
    assert remedy in message
    assert "Needed: " in message
