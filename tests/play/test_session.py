"""When chunks are begun and of what: page, model and person are played through by a clock of ours."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from drawn import DRIVING
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.errors import UserError
from anyflow.play.levers import levers_of
from anyflow.play.pace import SLACK, Pace
from anyflow.play.player import Made
from anyflow.play.session import Session, Wish, read_wish

FPS, FRAMES = 8.0, 8


def made(seconds: float, frames: int = FRAMES, is_given: bool = False) -> Made:
    return Made([b""] * frames, [[0.0, 0.0]] * frames, seconds, is_given, FRAMES)


class Page:
    """Shows each chunk for as long as it is told, and says when it begins to; its clock is the test's."""

    def __init__(self, session: Session) -> None:
        self.session, self.now, self.until = session, 0.0, 0.0
        self.shown: list[float] = []
        """When each chunk was shown from."""

    def wish(self, **changes: Any) -> None:
        self.session.hear(replace(self.session.wish, number=self.session.wish.number + 1, **changes), self.now)

    def chunk(self, seconds: float) -> Any:
        """Wait until the next chunk is due, let it take so many seconds, and show it when its turn comes."""
        delay = self.session.due(self.now)
        assert delay is not None
        self.now += delay
        task = self.session.take(self.now)
        self.now += seconds
        self.session.note(made(seconds))
        self.now = max(self.now, self.until)  # the chunk before is on show until then
        self.shown.append(self.now)
        self.until = self.now + self.session.on_show
        self.wish(shown=self.session.made)
        return task


@settings(deadline=None, max_examples=80)
@given(st.floats(0.01, 0.75), st.integers(6, 30))
def test_a_fast_model_keeps_the_footages_rate_and_begins_late(seconds: float, chunks: int) -> None:
    page = Page(Session(FPS, 2))
    begun = []
    for _ in range(chunks):
        page.chunk(seconds)
        begun.append(page.now)
    gaps = [later - earlier for earlier, later in zip(page.shown[2:], page.shown[3:], strict=False)]
    assert gaps == pytest.approx([FRAMES / FPS] * len(gaps))
    assert not page.session.pace.is_behind
    # a key is as old as making the chunk takes, with some slack, and no older
    assert page.session.due(page.now) == pytest.approx(FRAMES / FPS - SLACK * seconds)


@settings(deadline=None, max_examples=80)
@given(st.floats(1.05, 5.0), st.integers(4, 20))
def test_a_slow_model_begins_at_once_and_is_shown_slower(seconds: float, chunks: int) -> None:
    page = Page(Session(FPS, 2))
    for _ in range(chunks):
        page.chunk(seconds)
        assert page.session.due(page.now) == 0.0
    assert page.session.pace.is_behind and page.session.pace.rate == pytest.approx(FRAMES / seconds)
    assert page.session.on_show == pytest.approx(seconds)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 3.0), min_size=1, max_size=10), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5))
def test_a_wait_is_never_negative_and_never_longer_than_the_show(
    taken: list[float], shown: float, on: float, now: float
) -> None:
    pace = Pace(FPS)
    assert pace.wait(shown, on, now, FRAMES) == 0 == pace.rate
    for seconds in taken:
        pace.note(FRAMES, seconds)
    assert 0 <= pace.wait(shown, on, now, FRAMES) <= max(0.0, shown + on - now)
    assert pace.is_behind == (pace.rate < FPS) and pace.on_show(FRAMES) >= FRAMES / FPS
    pace.forget()
    assert pace.rate == 0 and not pace.is_behind


def test_no_chunk_is_ever_two_ahead_of_what_is_seen() -> None:
    session = Session(FPS, 2)
    assert session.due(0.0) == 0.0
    session.take(0.0)
    session.note(made(0.1, 1, is_given=True))
    assert session.due(100.0) is None  # the page, in a tab that nobody sees perhaps, has not shown it
    session.hear(Wish(1, shown=1), 100.0)
    assert session.due(100.0) == 0.0
    session.take(100.0)
    session.note(made(0.5))
    session.hear(Wish(2, shown=1), 101.0)
    assert session.due(200.0) is None


def test_a_tap_counts_in_the_next_chunk_and_once() -> None:
    page = Page(Session(FPS, 2))
    page.chunk(0.2)
    page.wish(keys=frozenset({"ArrowLeft"}))
    page.now += 0.3
    page.wish(keys=frozenset())
    page.wish(keys=frozenset({"ArrowUp"}))
    task = page.chunk(0.2)
    assert task.hands.keys == {"ArrowLeft": pytest.approx(0.3), "ArrowUp": math.inf}
    page.wish(keys=frozenset())  # it acted in a whole chunk already, and for as long as it was held since
    later = page.chunk(0.2).hands.keys
    assert set(later) == {"ArrowUp"} and later["ArrowUp"] < 2
    assert page.chunk(0.2).hands.keys == {}


def test_a_tap_of_no_time_at_all_is_not_lost() -> None:
    page = Page(Session(FPS, 2))
    page.chunk(0.2)
    page.wish(keys=frozenset({"Space"}))
    page.wish(keys=frozenset())
    assert page.chunk(0.2).hands.keys["Space"] > 0


def test_a_late_wish_is_forgotten() -> None:
    session = Session(FPS, 2)
    assert session.hear(Wish(5, steps=4), 0.0)
    assert not session.hear(Wish(4, steps=1), 0.1) and not session.hear(Wish(5, steps=1), 0.1)
    assert session.take(0.2).steps == 4


def test_other_steps_take_effect_at_the_next_chunk_and_the_speed_is_judged_anew() -> None:
    page = Page(Session(FPS, 8))
    for _ in range(3):
        assert page.chunk(2.0).steps == 8
    assert page.session.pace.is_behind
    page.wish(steps=1)
    assert not page.session.pace.is_behind
    assert page.chunk(0.2).steps == 1


def test_paused_is_still_and_a_new_beginning_is_at_once() -> None:
    page = Page(Session(FPS, 2))
    assert page.chunk(0.1).start == 0 and page.chunk(0.1).start is None
    page.wish(is_paused=True)
    assert page.session.due(page.now + 99) is None
    page.wish(run=1, start=2, keys=frozenset({"ArrowUp"}))
    page.wish(keys=frozenset())
    assert page.session.due(page.now) == 0.0
    task = page.session.take(page.now)
    assert task.start == 2 and task.hands.keys == {}  # keys of before do not steer the new one
    page.session.note(made(0.1, 1, is_given=True))
    page.wish(is_paused=False, shown=page.session.made)
    assert page.session.due(page.now) is not None and page.session.take(page.now).start is None


def test_a_press_of_record_counts_once() -> None:
    session = Session(FPS, 2)
    assert session.take_film() is None
    session.hear(Wish(1, film=1), 0.0)
    assert session.take_film() is True and session.take_film() is None
    session.hear(Wish(2, film=2), 0.0)
    assert session.take_film() is False and session.take_film() is None


GOOD: dict[str, Any] = {
    "number": 3, "keys": ["KeyW"], "sticks": [0.5, -2], "sliders": {"1": 0.2}, "steps": 4,
    "paused": False, "shown": 2, "run": 0, "start": 1, "film": 0,
}  # fmt: skip


def test_a_wish_is_read() -> None:
    wish = read_wish(GOOD, levers_of(DRIVING), 3)
    assert wish == Wish(3, frozenset({"KeyW"}), (0.5, -1.0), {1: 0.2}, 4, False, 2, 0, 1, 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([*GOOD, None]), JSON)
def test_whatever_a_page_sends_is_read_or_refused_in_words(field: str | None, value: Any) -> None:
    body = value if field is None else {**GOOD, field: value}
    try:
        wish = read_wish(body, levers_of(DRIVING), 3)
    except UserError as error:
        assert "reload" in str(error)
        return
    assert wish.steps in (1, 2, 4, 8) and 0 <= wish.start < 3 and len(wish.keys) <= 32
    assert all(math.isfinite(number) for number in (*wish.sticks, *wish.sliders.values()))
    assert set(wish.sliders) <= {0, 1} and max(map(abs, wish.sticks)) <= 1
