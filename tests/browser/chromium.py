"""Headless Chromium with an exported page: pictures in by its real input element, out what it says."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 180  # for which a page may take to answer
# Chromium is run as root in containers, and must not update itself or report anything meanwhile.
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,1000"),
)
PIXELS = """
  const {width, height} = arguments[0];
  return Array.from(arguments[0].getContext("2d").getImageData(0, 0, width, height).data);
"""


class Answer(NamedTuple):
    """What a page says about a picture.

    Attributes:
      name: the class in large letters; empty after an error.
      probabilities: of the classes with a bar, in their order.
      pixels: uint8 [side, side, 3], what the network saw; None after an error.
      error: the sentence; empty if there is none.
      text: all that is visible.
    """

    name: str
    probabilities: dict[str, float]
    pixels: np.ndarray | None
    error: str
    text: str


class Page:
    """An exported page, opened from its file."""

    def __init__(self, driver: webdriver.Chrome, path: Path, width: int = 1100) -> None:
        self.driver = driver
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get("about:blank")
        for kind in ("browser", "performance"):
            driver.get_log(kind)  # what is left of the page before
        driver.get(path.as_uri())

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.05).until(lambda _: condition())

    def loaded(self) -> "Page":
        """Waits until the model is ready, or cannot be."""
        self.wait(lambda: self.one("body").get_attribute("data-model"))
        return self

    def give(self, *files: Path) -> list[Answer]:
        """Chooses files with the input element and returns the answers in their order."""
        self.one("#file").send_keys("\n".join(map(str, files)))
        return self.answers(len(files))

    def answers(self, num: int = 1) -> list[Answer]:
        """Waits for the newest `num` answers."""
        return [self._answer(card) for card in self.wait(lambda: self._cards(num))]

    def _cards(self, num: int) -> Sequence[WebElement]:
        cards = self.driver.find_elements(By.CSS_SELECTOR, ".card")[:num]
        waiting = any(card.get_attribute("data-state") == "waiting" for card in cards)
        return cards if len(cards) == num and not waiting else []

    def _answer(self, card: WebElement) -> Answer:
        error = card.find_element(By.CSS_SELECTOR, ".error").text
        if error:
            return Answer("", {}, None, error, card.text)
        bars = card.find_elements(By.CSS_SELECTOR, ".bars li")
        names = [bar.find_element(By.CSS_SELECTOR, ".name").text for bar in bars]
        values = [float(bar.get_attribute("data-probability") or "nan") for bar in bars]
        pixels = self.driver.execute_script(PIXELS, card.find_element(By.CSS_SELECTOR, "canvas"))
        side = round((len(pixels) / 4) ** 0.5)
        seen = np.array(pixels, np.uint8).reshape(side, side, 4)[..., :3]
        name = card.find_element(By.CSS_SELECTOR, ".answer").text
        return Answer(name, dict(zip(names, values, strict=True)), seen, "", card.text)

    def console(self) -> list[str]:
        """What the page has written to the console since it was opened, errors of its own included."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that the page has asked for since it was opened."""
        entries = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]


def start(binary: str, chromedriver: str, profile: Path) -> webdriver.Chrome:
    """Starts Chromium with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
