"""Which key moves what, and what the numbers do then: laws for any controls, and the worlds that people have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drawn import DRIVING
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.data.importing.formats import vpt
from anyflow.errors import UserError
from anyflow.play.hands import REACH_SECONDS, SWEEP_SECONDS, Hands, Wheel
from anyflow.play.levers import DOWN, LEFT, RIGHT, UP, Lever, levers_of

FPS = 8.0
HELD = math.inf


def control(numbers: list[str], low: list[float], high: list[float], **further: Any) -> dict[str, Any]:
    return {"holds": "x", "width": len(numbers), "numbers": numbers, "low": low, "high": high, **further}


@st.composite
def continuous(draw: Any) -> dict[str, Any]:
    width = draw(st.integers(1, 5))
    ends = st.tuples(*[st.floats(-50, 50, width=32)] * 2).map(sorted)
    ranges = draw(st.lists(ends, min_size=width, max_size=width))
    names = draw(
        st.lists(
            st.sampled_from(["x", "dy", "speed", "turn", "steer", "lift", "closing", "yaw"]),
            min_size=width,
            max_size=width,
            unique=True,
        )
    )
    at = draw(st.sampled_from(["frame", "transition"]))
    unit = draw(st.sampled_from([[], ["m/s"] * width, ["pixel"] * width]))
    return control(names, [r[0] for r in ranges], [r[1] for r in ranges], at=at, unit=unit)


@st.composite
def multi_hot(draw: Any) -> dict[str, Any]:
    names = draw(
        st.lists(
            st.sampled_from(["forward", "back", "left", "right", "jump", "hotbar.1", "use", "fire", "x"]),
            min_size=1,
            max_size=9,
            unique=True,
        )
    )
    return {"holds": "keys", "width": len(names), "kind": "multi-hot", "numbers": names, "at": "transition"}


CONTROLS = st.dictionaries(
    st.sampled_from(["actions", "keys", "camera", "trajectory"]), continuous() | multi_hot(), min_size=1, max_size=3
)


def levers_or_none(controls: dict[str, Any]) -> list[Lever]:
    try:
        return levers_of(controls)
    except UserError as error:
        assert "say where things are" in str(error)
        return []


@st.composite
def played(draw: Any) -> tuple[list[Lever], list[tuple[Hands, int]]]:
    """Levers, and what hands do to them for a while."""
    levers = levers_or_none(draw(CONTROLS))
    codes = sorted({code for lever in levers for code in lever.more + lever.less})
    seconds = st.sampled_from([HELD, 0.01, 0.3, 1.5])
    keys = st.dictionaries(st.sampled_from(codes), seconds, max_size=4) if codes else st.just({})
    places = [place for place, lever in enumerate(levers) if lever.kind == "slider"]
    sliders = st.dictionaries(st.sampled_from(places), st.floats(-100, 100), max_size=2) if places else st.just({})
    sticks = st.tuples(*[st.floats(-1, 1)] * 2)
    hands = st.builds(Hands, keys, sticks, sliders)
    return levers, draw(st.lists(st.tuples(hands, st.integers(1, 12)), min_size=1, max_size=4))


@settings(deadline=None, max_examples=150)
@given(CONTROLS)
def test_no_key_does_two_things(controls: dict[str, Any]) -> None:
    levers = levers_or_none(controls)
    codes = [code for lever in levers for code in lever.more + lever.less]
    assert len(codes) == len(set(codes))
    assert not {"KeyP"} & set(codes)  # the page's own
    axes = [lever for lever in levers if lever.kind == "axis"]
    assert len({lever.stick for lever in axes}) == len(axes) <= 2
    assert all(lever.more and lever.less for lever in axes)
    assert all(lever.more for lever in levers if lever.kind == "key")
    assert all(lever.kind == "slider" for lever in levers if lever.is_state)
    if levers:
        assert len(levers) == sum(facts["width"] for facts in controls.values())


@settings(deadline=None, max_examples=150)
@given(played())
def test_numbers_stay_in_their_range_and_move_smoothly(case: tuple[list[Lever], list[tuple[Hands, int]]]) -> None:
    levers, moves = case
    if not levers:
        return
    wheel = Wheel(levers, FPS)
    before = np.array(wheel.values)
    for hands, frames in moves:
        rows = wheel.move(hands, frames)
        for lever, column, first in zip(levers, rows.T.astype(float), before, strict=True):
            known = column[~np.isnan(column)]
            assert (known >= np.float32(lever.low)).all() and (known <= np.float32(lever.high)).all()
            if lever.kind == "key":
                assert set(known) <= {0.0, 1.0}
            elif lever.kind == "axis":
                far = max(lever.high - (lever.rest or 0), (lever.rest or 0) - lever.low)
                step = (lever.high - lever.low) / SWEEP_SECONDS if lever.rest is None else far / REACH_SECONDS
                steps = np.abs(np.diff([first, *known] if len(known) == len(column) else known))
                assert (steps <= step / FPS * (1 + 1e-4) + 1e-4).all()
        before = np.array(wheel.values)


@settings(deadline=None, max_examples=100)
@given(played(), st.integers(1, 9), st.integers(1, 9))
def test_keys_that_stay_held_do_not_know_of_chunks(case: Any, one: int, other: int) -> None:
    levers, moves = case
    if not levers:
        return
    hands = Hands(dict.fromkeys(moves[0][0].keys, HELD), moves[0][0].sticks, moves[0][0].sliders)
    parts, whole = Wheel(levers, FPS), Wheel(levers, FPS)
    rows = np.concatenate([parts.move(hands, one), parts.move(hands, other)])
    np.testing.assert_array_equal(rows, whole.move(hands, one + other))


@settings(deadline=None, max_examples=100)
@given(played())
def test_what_is_let_go_goes_back_or_stays(case: Any) -> None:
    levers, moves = case
    if not levers:
        return
    wheel = Wheel(levers, FPS)
    for hands, frames in moves:
        wheel.move(hands, frames)
    left = list(wheel.values)
    wheel.move(Hands(), math.ceil(REACH_SECONDS * FPS) + 1)
    for lever, value, was in zip(levers, wheel.values, left, strict=True):
        if lever.kind == "axis" and lever.rest is not None:
            assert value == pytest.approx(lever.rest)
        elif lever.kind != "key":
            assert value == was


def test_a_road() -> None:
    speed, heading = levers_of(DRIVING)
    assert (speed.more, speed.less, speed.rest, speed.begin) == (UP, DOWN, None, 10.0)
    assert (heading.more, heading.less, heading.rest) == (RIGHT, LEFT, 0.0)
    wheel = Wheel([speed, heading], FPS)
    rows = wheel.move(Hands({"ArrowLeft": HELD, "KeyW": HELD}), 8)
    assert rows[-1].tolist() == [14.0, -0.5] and rows[0].tolist() == [10.5, pytest.approx(-0.15625)]
    assert wheel.move(Hands(), 8)[-1].tolist() == [14.0, 0.0]  # the speed stays, the wheel goes back


def test_a_short_tap_acts_as_long_as_it_was_held_and_on_one_frame_at_least() -> None:
    for seconds, frames in ((0.001, 1), (0.3, 3), (HELD, 8)):
        rows = Wheel(levers_of(DRIVING), FPS).move(Hands({"ArrowUp": seconds}), 8)
        assert (np.diff([10.0, *rows[:, 0]]) > 0).sum() == frames


def test_the_first_frame_has_no_action_that_led_to_it() -> None:
    actions = control(["turn_right", "forward"], [-1.2, 0.0], [1.2, 16.0], at="transition")
    wheel = Wheel(levers_of({"actions": actions}), FPS)
    first, second = wheel.move(Hands(), 1), wheel.move(Hands(), 1)
    assert np.isnan(first).all() and not np.isnan(second).any()
    wheel.begin()
    assert np.isnan(wheel.move(Hands(), 2)[:, 0]).tolist() == [True, False]


def test_a_hall_is_walked_through_while_a_key_is_held() -> None:
    turn, forward = levers_of(
        {"actions": control(["turn_right", "forward"], [-1.2, 0.0], [1.2, 16.0], at="transition")}
    )
    assert (turn.more, turn.less, turn.rest) == (RIGHT, LEFT, 0.0)
    assert (forward.more, forward.rest) == (UP, 0.0)


def test_domains_share_the_keys_and_know_nothing_of_each_other() -> None:
    hall = control(["turn_right", "forward"], [-1.2, 0.0], [1.2, 16.0], at="transition")
    controls = {"driving.actions": DRIVING["actions"], "games.actions": hall}
    levers = levers_of(controls)
    assert [lever.domain for lever in levers] == ["driving"] * 2 + ["games"] * 2
    assert [lever.more for lever in levers] == [UP, RIGHT, RIGHT, UP]
    wheel = Wheel(levers, FPS)
    for domain, known in (("driving", [True, True, False, False]), ("games", [False, False, True, True])):
        wheel.begin(domain)
        wheel.move(Hands(), 1)
        rows = wheel.move(Hands({"KeyD": HELD, "KeyW": HELD}), 4)
        assert (~np.isnan(rows)).all(0).tolist() == known == (~np.isnan(rows)).any(0).tolist()
    alone = levers_of({"games.actions": hall}, ["games"])
    assert {lever.domain for lever in alone} == {"games"}
    assert {lever.domain for lever in levers_of({"observation.arm": hall}, ["games"])} == {""}


def test_a_wheel_that_counts_to_the_left() -> None:
    steering = {
        "holds": "per frame: steering wheel, degrees to the left",
        "width": 1,
        "unit": ["degree"],
        "low": [-90.0],
        "high": [80.0],
    }
    speed = {"holds": "per frame: metres a second", "width": 1, "unit": ["m/s"], "low": [0.0], "high": [30.0]}
    first, second = levers_of({"speed": speed, "steering": steering})
    assert (first.more, first.rest) == (UP, None) and (second.more, second.less) == (LEFT, RIGHT)
    stick = Wheel([first, second], FPS).move(Hands(sticks=(1.0, 0.5)), 8)
    assert stick[-1, 1] == -90 and stick[-1, 0] > 15
    assert [lever.stick for lever in levers_of({"steering": steering, "speed": speed})] == [0, 1]


def test_minecraft_has_its_keys_and_the_arrows_look_around() -> None:
    mouse = vpt.MOUSE.to_dict() | {"low": [-60.0, -20.0], "high": [60.0, 20.0]}
    levers = levers_of({"keys": vpt.HELD.to_dict(), "mouse": mouse})
    keys = {lever.label: lever.more for lever in levers}
    assert {name: keys[name] for name in ("forward", "left", "jump", "hotbar.3")} == {
        "forward": ("KeyW",),
        "left": ("KeyA",),
        "jump": ("Space",),
        "hotbar.3": ("Digit3",),
    }
    assert keys["dx"] == ("ArrowRight",) and keys["dy"] == ("ArrowDown",)  # rows count downwards


def test_a_robot_has_sliders_for_what_two_axes_do_not_move() -> None:
    levers = levers_of(
        {"actions": control(["x", "y", "z", "closing"], [-0.2, -0.5, -0.7, -1], [0.7, 0.7, 0.5, 1], at="transition")}
    )
    assert [lever.kind for lever in levers] == ["axis", "axis", "slider", "slider"]
    assert [lever.stick for lever in levers[:2]] == [0, 1]
    rows = Wheel(levers, FPS).move(Hands(sliders={3: 0.25, 2: -9}), 3)
    assert rows[-1, 2:].tolist() == [pytest.approx(-0.7), 0.25]


def test_states_are_not_for_keys() -> None:
    place = {
        "holds": "per frame: [x, y] in pixels",
        "width": 2,
        "unit": ["pixel", "pixel"],
        "low": [0.0, 0.0],
        "high": [9.0, 9.0],
    }
    with pytest.raises(UserError, match="trajectory alone, which say"):
        levers_of({"trajectory": place})
    levers = levers_of({**DRIVING, "trajectory": place})
    assert [lever.is_state for lever in levers] == [False, False, True, True]
    assert [lever.kind for lever in levers] == ["axis", "axis", "slider", "slider"]
