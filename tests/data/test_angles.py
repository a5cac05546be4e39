"""Angles among controls: they are found by the jump that they make where they go round, and by nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyflow.data.angles import FEWEST_VALUES, found_angles, jumped_turns
from anyflow.data.controls import Control

POSE = Control("a pose", 3, unit=("m", "rad", "rad"), numbers=("x", "roll", "yaw"), low=(-9.0,) * 3, high=(9.0,) * 3)


def walk(seed: int, length: int, speed: float) -> np.ndarray:
    """An angle in turns that has gone round at least once, without bounds."""
    return np.random.default_rng(seed).uniform(0.2, 1, length).cumsum() * speed + 0.37


@given(
    st.integers(0, 99), st.integers(60, 90), st.sampled_from([2 * np.pi, 360.0]), st.sampled_from([0.0, 0.5]), st.data()
)
def test_an_angle_that_goes_round_is_found_wherever_its_turn_begins(
    seed: int, length: int, turn: float, start: float, data: st.DataObject
) -> None:
    """Round zero or from zero up, in radians or degrees, forward or back, some entries unknown."""
    angle = (walk(seed, length, data.draw(st.sampled_from([-0.04, 0.04]))) + start) % 1 - start
    straight = np.cumsum(np.random.default_rng(seed).normal(size=length))
    rows = np.stack([angle * turn, straight], axis=1)
    rows[data.draw(st.integers(0, length - 1))] = np.nan
    assert jumped_turns(rows).tolist() == [turn, 0]


@pytest.mark.parametrize(
    "values",
    [
        np.where(np.arange(40) % 9 < 4, 0.0, 6.25),  # a switch
        np.linspace(-3.1, 3.1, 40),  # once through the turn, and no jump
        np.random.default_rng(0).uniform(-np.pi, np.pi, 400),  # no path
        walk(0, 60, 0.04) % 1 * 7,  # a saw of another length
        np.repeat([3.0, -3.0, 2.0, -1.0, 1.5, -3.1, 3.1], 6),  # a command that is held
        np.repeat([3.1, -3.1, 3.1], 20) + np.random.default_rng(0).normal(scale=0.005, size=60),  # likewise, with noise
        np.full(40, np.nan),
        np.array([3.14, -3.14]),
    ],
)
def test_what_is_no_angle(values: np.ndarray) -> None:
    assert jumped_turns(values[:, None]).tolist() == [0]
    assert len(np.unique(np.where(np.arange(40) % 9 < 4, 0.0, 6.25))) < FEWEST_VALUES


def test_numbers_in_an_angles_unit_are_angles_and_a_card_has_the_last_word() -> None:
    rows = [np.stack([np.linspace(0, 1, 9), np.linspace(-3, 3, 9), np.linspace(-1, 1, 9)], axis=1)]
    jumped = np.array([0.0, 2 * np.pi, 0.0])
    assert found_angles(POSE, jumped, rows).period == (0.0, 6.28319, 6.28319)
    assert found_angles(replace(POSE, unit=()), jumped, rows).period == (0.0, 6.28319, 0.0)
    assert found_angles(POSE, jumped, [*rows, 4 * rows[0]]) == POSE, "another clip goes farther than a turn"
    for settled in (
        replace(POSE, period=(0.0, 0.0, 0.0)),
        replace(POSE, at="transition", skipped="sum"),
        replace(POSE, kind="multi-hot"),
    ):
        assert found_angles(settled, jumped, rows) == settled
    assert found_angles(POSE, None, []) == POSE
