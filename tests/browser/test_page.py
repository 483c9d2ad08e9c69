"""What a page does besides answering: errors in words, privacy, keyboard, screen readers, narrow and dark screens."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cifar_jax.export.trained_model import TrainedModel

pytestmark = pytest.mark.browser

HOSTILE = ['<b>&"</script>', "'; alert(1) //", "<!-- --><script>", "\u2028line", "{{ 7 * 7 }}", "ré 漢字"]
# A file that is handed over by an event, as a person's would be: its bytes, its name, the event's name.
HAND_OVER = """
  const [bytes, name, event] = arguments, data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
  const init = {bubbles: true, cancelable: true};
  dispatchEvent(event === "paste" ? new ClipboardEvent(event, {...init, clipboardData: data})
                                  : new DragEvent(event, {...init, dataTransfer: data}));
"""
# Reaches for a server, and says what became of it.
CONNECT = """
  const done = arguments[0];
  addEventListener("securitypolicyviolation", ({effectiveDirective}) => done("refused: " + effectiveDirective));
  fetch("https://example.com/").then(() => done("sent"), () => setTimeout(done, 2000, "failed"));
"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (80, 60), (30, 120, 200)).save(path)
    return path


def test_nothing_leaves_the_page(shapes_model: TrainedModel, make_page: Callable[..., Any], picture: Path) -> None:
    page = make_page(shapes_model)
    assert page.give(picture)[0].name
    asked = page.requests()
    assert [url for url in asked if not url.startswith(("blob:", "data:"))] == [page.driver.current_url]
    assert page.driver.current_url.startswith("file://")
    assert page.console() == []
    # Not only does it send nothing: it may not.
    assert page.driver.execute_async_script(CONNECT) == "refused: connect-src"


def test_errors_in_words(
    shapes_model: TrainedModel, make_page: Callable[..., Any], picture: Path, tmp_path: Path
) -> None:
    text, cut = tmp_path / "notes.txt", tmp_path / "cut.png"
    text.write_text("not a picture")
    cut.write_bytes(picture.read_bytes()[:50])
    page = make_page(shapes_model)
    answers = page.give(text, picture, cut)
    assert answers[0].error == (
        "notes.txt is not a picture that this browser can read. Choose a JPEG, PNG or WebP file."
    )
    assert answers[1].name and not answers[1].error
    assert answers[2].error.startswith("cut.png is not a picture")
    assert page.console() == []


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_other_ways(event: str, shapes_model: TrainedModel, make_page: Callable[..., Any], picture: Path) -> None:
    page = make_page(shapes_model)
    page.driver.execute_script(HAND_OVER, list(picture.read_bytes()), "handed.png", event)
    (answer,) = page.answers()
    assert answer.name and "handed.png" in answer.text


def test_without_webassembly(
    shapes_model: TrainedModel, make_page: Callable[..., Any], driver: Any, picture: Path
) -> None:
    script = driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": "delete globalThis.WebAssembly"}
    )
    try:
        page = make_page(shapes_model).loaded()
        expected = "This browser has no WebAssembly, which the model needs. Open the page in a current browser."
        assert page.one("#failure").text == expected
        assert page.give(picture)[0].error == "Not classified, as the model cannot be run; the reason is above."
        assert page.console() == []
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_keyboard(shapes_model: TrainedModel, make_page: Callable[..., Any], driver: Any, picture: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    page = make_page(shapes_model).loaded()
    # The dialog itself is the browser's, and would stay open: what counts is that the key asks for it.
    driver.execute_script(
        "window.asked = 0; document.querySelector('#file').addEventListener('click',"
        "  (event) => { event.preventDefault(); window.asked += 1; });"
    )
    ActionChains(driver).send_keys(Keys.TAB).perform()
    focused = driver.switch_to.active_element
    assert focused == page.one("#file")
    outline = page.one(".drop").value_of_css_property("outline-style")
    assert outline == "solid"
    for asked, key in enumerate((Keys.ENTER, Keys.SPACE), start=1):
        ActionChains(driver).send_keys(key).perform()
        assert page.wait(lambda: driver.execute_script("return window.asked")) == asked
    assert page.give(picture)[0].name
    assert driver.switch_to.active_element.get_attribute("id") == "file"


def test_clear(shapes_model: TrainedModel, make_page: Callable[..., Any], driver: Any, picture: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    page = make_page(shapes_model).loaded()
    clear = page.one("#clear")
    assert not clear.is_displayed()
    ActionChains(driver).send_keys(Keys.TAB).perform()
    assert driver.switch_to.active_element == page.one("#file")
    for key in (Keys.ENTER, Keys.SPACE):
        assert page.give(picture)[0].name and clear.is_displayed()
        ActionChains(driver).send_keys(Keys.TAB).perform()
        assert driver.switch_to.active_element == clear and clear.accessible_name == "Clear"
        assert clear.value_of_css_property("outline-style") == "solid"
        ActionChains(driver).send_keys(key).perform()
        page.wait(lambda: not clear.is_displayed())
        assert not driver.find_elements("css selector", ".card")
        assert page.one("#live").get_property("textContent") == "The results are cleared."
        assert driver.switch_to.active_element == page.one("#file")
    # What is still to be classified is cleared with the rest, and is not announced.
    cleared = HAND_OVER + "document.querySelector('#clear').click();"
    driver.execute_script(cleared, list(picture.read_bytes()), "cleared.png", "drop")
    time.sleep(1)
    assert not driver.find_elements("css selector", ".card")
    assert page.one("#live").get_property("textContent") == "The results are cleared."
    assert "a picture.png" in page.give(picture)[0].text and page.console() == []


def test_screen_readers(
    shapes_model: TrainedModel, make_page: Callable[..., Any], picture: Path, tmp_path: Path
) -> None:
    page = make_page(shapes_model)
    chooser = page.one("#file")
    assert chooser.accessible_name == "Drop a photo here, or choose a file"
    (answer,) = page.give(picture)
    live = page.one("#live")
    assert live.aria_role == "status" and live.get_attribute("aria-live") == "polite"
    share = f"{100 * answer.probabilities[answer.name]:.1f}"
    said = str(live.get_property("textContent")).replace("\u00a0", " ")
    assert said == f"a picture.png: {answer.name}, {share} %"
    assert page.one(".card img").accessible_name == "The picture a picture.png"
    assert page.one(".card canvas").accessible_name.startswith("What the model sees")
    assert page.one(".bars").accessible_name == "Likeliest classes"
    assert page.one("#results").accessible_name == "Results"
    other = tmp_path / "other.txt"
    other.write_text("text")
    (answer,) = page.give(other)
    assert page.one("#live").get_property("textContent") == answer.error


def test_hostile_names(shapes_model: TrainedModel, make_page: Callable[..., Any], picture: Path) -> None:
    names = [*HOSTILE, *(f"class {number}" for number in range(len(HOSTILE), len(shapes_model.class_names)))]
    data = shapes_model.about["data"] | {"dataset": "</title><script>alert(1)</script>"}
    page = make_page(replace(shapes_model, about=shapes_model.about | {"class_names": names, "data": data}))
    (answer,) = page.give(picture)
    shown = [bar.get_property("textContent") for bar in page.driver.find_elements("css selector", ".bars .name")]
    assert len(shown) == 5 and set(shown) <= set(names) and answer.name
    listed = [name.get_property("textContent") for name in page.driver.find_elements("css selector", ".lead b")]
    assert listed == names
    assert page.driver.title == f"{data['dataset']}: what does the picture show?"
    assert page.console() == []


def test_sentences(shapes_model: TrainedModel, make_page: Callable[..., Any]) -> None:
    scores = {"split": "test", "num": 1234, "accuracy": 0.9, "accuracy_interval_95": [0.88, 0.915]}
    page = make_page(replace(shapes_model, about=shapes_model.about | {"scores": scores}))
    text = page.one("body").text
    assert "The picture stays on this machine" in text
    assert "shapes, 10 classes." in text
    assert "90.0 % of 1,234 test images (95 % interval 88.0 to 91.5 %)" in text
    assert "onnxruntime-web 1." in text and "built into this page, which needs no network" in text


@pytest.fixture
def schemes(driver: Any) -> Iterator[Callable[[str], None]]:
    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}] if scheme else []
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    yield prefer
    prefer("")


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)` or `rgba(...)`, as WCAG 2 defines it."""
    values = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_legible(
    scheme: str,
    schemes: Callable[[str], None],
    shapes_model: TrainedModel,
    make_page: Callable[..., Any],
    picture: Path,
    tmp_path: Path,
) -> None:
    schemes(scheme)
    long = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch" * 2
    names = [f"{number} {long}" for number in range(len(shapes_model.class_names))]
    page = make_page(replace(shapes_model, about=shapes_model.about | {"class_names": names}), width=360)
    text = tmp_path / "a file with a long name.txt"
    text.write_text("text")
    page.give(text, picture)
    time.sleep(0.3)  # transitions
    width, needed = page.driver.execute_script(
        "const {clientWidth, scrollWidth} = document.documentElement; return [clientWidth, scrollWidth];"
    )
    assert needed <= width <= 360
    ground = page.one("body").value_of_css_property("background-color")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    surface = page.one(".card").value_of_css_property("background-color")
    on_surface = [".card .error", ".card .facts", ".card .answer", ".bars .percent", ".drop u", ".drop .ways", "#clear"]
    on_ground = [".lead", ".private", "dt", "dd", "footer"]
    for selectors, behind in ((on_surface, surface), (on_ground, ground)):
        for selector in selectors:
            color = page.one(selector).value_of_css_property("color")
            assert contrast(color, behind) >= 4.5, (selector, color, behind)
