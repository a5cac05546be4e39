"""In a real browser: keys are pressed, and the answer is read from the picture on the page.

Needs Debian's packages chromium and chromium-driver, and selenium (`pip install -e '.[dev]'`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import drawn
import pytest
from drawn import HEIGHT, WIDTH, DrawnRollout, Served
from looking import keep_picture, text_of, wait_for

pytestmark = pytest.mark.slow

WATCH = f"""
window.path = [];
setInterval(() => {{
  const data = document.getElementById("picture").getContext("2d").getImageData(0, 0, {WIDTH}, {HEIGHT}).data;
  let [x, y, count] = [0, 0, 0];
  for (let i = 0; i < data.length; i += 4) {{
    if (data[i] > 200) {{ x += (i / 4) % {WIDTH}; y += Math.floor(i / 4 / {WIDTH}); count += 1; }}
  }}
  window.path.push(count ? [x / count, y / count] : null);
}}, 20);
"""
"""Takes down where the dot is, and was."""


class Page:
    """A page in a browser, and what is read from it."""

    def __init__(self, browser: Any, served: Served) -> None:
        self.browser, self.served = browser, served
        browser.get(served.address)
        self.wait(lambda: self.text("fps").endswith("fps"), "the first frames")
        browser.execute_script(WATCH)
        self.wait(self.dot, "the dot")

    def wait(self, found: Any, what: str) -> Any:
        return wait_for(self.browser, found, what)

    def text(self, place: str) -> str:
        return str(self.browser.find_element("id", place).text)

    def dot(self) -> Any:
        """Where it is now."""
        return self.browser.execute_script("return window.path.at(-1)")

    def path(self) -> list[list[float]]:
        """Where it was since this was last asked."""
        found = self.browser.execute_script("const was = window.path; window.path = [was.at(-1)]; return was")
        return [place for place in found if place]

    def key(self, code: str, is_down: bool) -> None:
        kind = "rawKeyDown" if is_down else "keyUp"
        self.browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "code": code, "key": code})

    def pressed(self) -> list[str]:
        """The keys that are shown as held."""
        script = "return [...document.querySelectorAll('.key[aria-pressed=true]')].map((one) => one.textContent)"
        return self.browser.execute_script(script)

    def complaints(self) -> list[str]:
        """Errors of the scripts, and what the page's policy refused."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser: Any, site: Any) -> Iterator[Page]:
    with ExitStack() as stack:
        yield Page(browser, stack.enter_context(site()))
        browser.get("about:blank")


MIDDLE, LEFT, UP = WIDTH / 2, WIDTH * 0.1, HEIGHT * 0.1


def test_keys_steer_the_picture(page: Page) -> None:
    x, y = page.dot()
    assert x == pytest.approx(MIDDLE, abs=2) and y == pytest.approx(HEIGHT / 2, abs=2)
    page.key("ArrowLeft", True)
    assert page.pressed() == ["←"], "told at once, whatever the model is doing"
    page.wait(lambda: page.dot()[0] == pytest.approx(LEFT, abs=2), "the dot at the left")
    page.wait(lambda: page.text("latency").endswith("ms"), "the latency")
    assert 0 < int(page.text("latency").removesuffix(" ms")) < 60_000
    assert page.text("value-1") == "-0.50"
    page.key("ArrowLeft", False)
    assert not page.pressed()
    page.wait(lambda: page.dot()[0] == pytest.approx(MIDDLE, abs=2), "the dot back in the middle")
    page.key("KeyW", True)
    page.wait(lambda: page.dot()[1] == pytest.approx(UP, abs=2), "the dot at the top")
    page.key("KeyW", False)
    page.path()
    page.wait(lambda: len(DrawnRollout.made) > 12, "further chunks")
    assert all(place[1] == pytest.approx(UP, abs=2) for place in page.path())  # the speed stays
    keep_picture(page.browser, "play")
    assert not page.complaints()


def test_a_tap_between_two_chunks_is_seen(page: Page) -> None:
    page.path()
    page.key("KeyD", True)
    page.key("KeyD", False)
    page.wait(lambda: max(place[0] for place in [*page.path(), [0, 0]]) > MIDDLE + 4, "a move to the right")
    page.wait(lambda: page.dot()[0] == pytest.approx(MIDDLE, abs=2), "the dot back in the middle")


def test_a_gamepad_steers_too(page: Page) -> None:
    page.browser.execute_script(
        "const pad = { axes: [-1, 0.02], buttons: [] };"
        "Object.defineProperty(navigator, 'getGamepads', { value: () => [null, pad] });"
    )
    page.wait(lambda: page.dot()[0] == pytest.approx(LEFT, abs=2), "the dot at the left")
    assert page.dot()[1] == pytest.approx(HEIGHT / 2, abs=2)


def test_steps_pause_and_another_start(page: Page) -> None:
    page.browser.execute_script(
        "const steps = document.getElementById('steps'); steps.value = 3; steps.dispatchEvent(new Event('input'));"
    )
    page.wait(lambda: DrawnRollout.made[-1] == 8 and page.text("steps-now") == "8", "8 steps")
    page.browser.find_element("id", "pause").click()
    page.wait(lambda: page.text("pause") == "Go on", "the pause")
    page.wait(lambda: page.text("fps") == "–", "stillness")
    made = len(DrawnRollout.made)
    page.key("ArrowLeft", True)
    page.wait(lambda: len(page.path()) > 40, "some time")
    assert len(DrawnRollout.made) == made  # nothing piles up
    page.key("ArrowLeft", False)
    page.browser.find_elements("css selector", "#starts button")[1].click()
    ground = "return document.getElementById('picture').getContext('2d').getImageData(1, 1, 1, 1).data[0]"
    page.wait(lambda: abs(page.browser.execute_script(ground) - 60) < 4, "the other start")
    assert page.text("pause") == "Pause"
    assert not page.complaints()


def test_a_film_is_recorded(page: Page, tmp_path: Path) -> None:
    page.browser.find_element("id", "record").click()
    page.wait(lambda: "recording to" in page.text("film"), "where it is recorded to")
    made = len(DrawnRollout.made)
    page.wait(lambda: len(DrawnRollout.made) > made + 1, "some chunks")
    page.browser.find_element("id", "record").click()
    page.wait(lambda: f"frames: {tmp_path / 'film.mp4'}" in page.text("film"), "where it was recorded to")
    assert (tmp_path / "film.mp4").stat().st_size > 500


def test_a_model_that_cannot_keep_up_is_told(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DrawnRollout, "seconds", 1.4)
    page.wait(lambda: "of the footage’s 8 frames a second: it plays slower" in page.text("said"), "the sentence")
    page.key("ArrowLeft", True)
    page.wait(lambda: page.dot()[0] == pytest.approx(LEFT, abs=2), "the dot at the left")
    page.key("ArrowLeft", False)
    keep_picture(page.browser, "play-slow")


def test_controls_of_the_starts_domain_are_shown_and_steered(browser: Any, site: Any) -> None:
    hall = {**drawn.DRIVING["actions"], "numbers": ["forward", "turn_right"], "low": [6.0, -0.5], "high": [14.0, 0.5]}
    controls = {"driving.actions": drawn.DRIVING["actions"], "games.actions": hall}
    with site(controls=controls, domains=["games", "driving"]) as served:
        page = Page(browser, served)
        assert "turn_right" in page.text("levers") and "heading" not in page.text("levers")
        page.key("KeyA", True)
        page.wait(lambda: page.dot()[0] == pytest.approx(LEFT, abs=2), "the dot at the left")
        assert page.text("value-3") == "-0.50"
        page.key("KeyA", False)
        browser.find_elements("css selector", "#starts button")[1].click()
        page.wait(lambda: "heading" in page.text("levers") and "turn_right" not in page.text("levers"), "the road's")
        page.key("KeyD", True)
        page.wait(lambda: page.dot()[0] == pytest.approx(WIDTH * 0.9, abs=2), "the dot at the right")
        page.key("KeyD", False)
        browser.get("about:blank")


def test_one_person_steers_at_a_time(page: Page) -> None:
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    page.browser.get(page.served.address)
    page.wait(lambda: "Another page steers this model already" in text_of(page.browser), "the refusal")
    second = page.browser.current_window_handle
    page.browser.switch_to.window(first)
    page.browser.close()
    page.browser.switch_to.window(second)
    page.wait(lambda: page.text("fps").endswith("fps"), "the turn of the second page")
