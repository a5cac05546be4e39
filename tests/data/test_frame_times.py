"""When a frame is on show: laws of the stamps, whatever they are."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyflow.data.faults import DecodeError
from anyflow.data.frame_times import APART, PAUSE, SLACK, Clock, Shown, Stamp, decide, follow, resampled

TICKS = st.sampled_from([Fraction(1, 1000), Fraction(1, 12800), Fraction(1, 90_000), Fraction(1001, 30_000)])
RATES = st.sampled_from([Fraction(5), Fraction(12), Fraction(16), Fraction(24000, 1001), Fraction(25), Fraction(30)])


def steady(rate: Fraction, tick: Fraction, count: int, first: int = 0) -> list[int]:
    """Stamps of a camera that never misses a beat, rounded to the tick."""
    return [first + round(number / rate / tick) for number in range(count)]


def clock_of(stamps: list[int], tick: Fraction, claimed: Fraction | None) -> Clock:
    return decide([Stamp(stamp, stamp) for stamp in stamps], tick, claimed, reorders=False)


@given(RATES, TICKS, st.integers(-(10**9), 10**9), st.sampled_from([None, Fraction(1000), Fraction(90_000), "true"]))
def test_a_steady_camera(rate: Fraction, tick: Fraction, first: int, claimed: Fraction | str | None) -> None:
    """Whatever the header claims and whenever the clock began: the rate is the camera's, frame k is at k / rate."""
    if 1 / rate < 5 * tick:
        tick = Fraction(1, 90_000)  # ticks of the size of a frame are another case
    stamps = steady(rate, tick, 32, first)
    clock = clock_of(stamps, tick, rate if claimed == "true" else claimed)  # type: ignore[arg-type]
    assert clock.how == "stamped" and abs(clock.rate / rate - 1) < 2e-3
    assert bool(clock.notes) == (claimed not in (None, "true"))  # a header that lies is told
    shown = list(follow([(stamp, stamp) for stamp in stamps], clock))
    assert all(not frame.why for frame in shown)
    assert all(abs(frame.start - number / rate) <= tick for number, frame in enumerate(shown))


@given(RATES, TICKS, st.integers(1, 40), st.sampled_from([24, 31, 32, 33]))
def test_counters_that_start_again(rate: Fraction, tick: Fraction, before: int, bits: int) -> None:
    """A counter that runs over gives the times of one that does not."""
    stamps = steady(rate, tick, 60, 2**bits - round(before / rate / tick))
    clock = clock_of(stamps[:32], tick, rate)
    plain = list(follow([(None, stamp) for stamp in stamps], clock))
    wrapped = list(follow([(None, stamp % 2**bits) for stamp in stamps], clock))
    assert [frame.why for frame in wrapped] == [frame.why for frame in plain]
    assert [frame.start for frame in wrapped] == pytest.approx([frame.start for frame in plain], abs=1e-6)


ANY = st.lists(st.one_of(st.none(), st.integers(-200, 200), st.integers(-(2**34), 2**34)), max_size=40)


@given(ANY, st.sampled_from(["stamped", "ordered", "counted"]))
def test_any_stamps_at_all(stamps: list[int | None], how: str) -> None:
    """Every frame comes out once and in order; time never goes back; no frame is held through a pause."""
    clock = Clock(how, Fraction(10), Fraction(1, 100))  # type: ignore[arg-type]
    shown = list(follow(enumerate(stamps), clock))
    assert [frame.item for frame in shown] == list(range(len(stamps)))
    for frame, after in pairwise(shown):
        assert frame.start <= after.start and frame.until <= after.start
        assert frame.until - frame.start <= (PAUSE - SLACK) * 0.1 + 1e-6
        if after.start - frame.start > PAUSE * 0.1 + 1e-6:
            assert after.why in APART
    if how == "counted":
        assert [frame.start for frame in shown] == pytest.approx([number / 10 for number in range(len(stamps))])


@given(
    st.lists(st.floats(0.02, 0.4), min_size=1, max_size=30), st.floats(1.0, 60.0), st.floats(0.0, 5.0), st.booleans()
)
def test_resampling_is_what_is_on_show(steps: list[float], fps: float, begin: float, bridge: bool) -> None:
    """Against the definition: at t0 + k / fps, the last frame that has begun by then, give or take the slack."""
    starts = [begin + sum(steps[:number]) for number in range(len(steps))]
    slack = SLACK / 10
    ends = [start - slack for start in [*starts[1:], starts[-1] + 0.1]]
    shown = [Shown(number, start, until) for number, (start, until) in enumerate(zip(starts, ends, strict=True))]
    samples = list(resampled(shown, fps, bridge))
    got = [sample.item for sample in samples for _ in range(sample.instants)]
    times = [begin + number / fps for number in range(len(got))]
    for time, item in zip(times, got, strict=True):
        assert starts[item] - slack <= time + 1e-6 and time < ends[item] + 1e-6
    assert times[-1] < ends[-1] + 1e-6 and begin + len(got) / fps >= ends[-1] - 1e-6  # to the end, and not beyond
    assert all(sample.time == pytest.approx(times[got.index(sample.item)]) for sample in samples)


def test_after_a_pause_the_instants_begin_anew() -> None:
    clock = Clock("stamped", Fraction(10), Fraction(1, 100))
    stamps = [0, 10, 20, 93, 103, 113]
    samples = list(resampled(follow(enumerate(stamps), clock), 10.0))
    assert [(sample.item, sample.instants, round(sample.time, 3), sample.apart) for sample in samples] == [
        (0, 1, 0.0, False),
        (1, 1, 0.1, False),
        (2, 1, 0.2, False),
        (3, 1, 0.93, True),
        (4, 1, 1.03, False),
        (5, 1, 1.13, False),
    ]
    held = list(resampled(follow(enumerate(stamps), clock), 10.0, bridge=True))
    assert not any(sample.apart for sample in held)


@pytest.mark.parametrize(
    ("stamps", "why"),
    [
        ([0, 10, 20, 85], ["", "", "", "pause"]),
        ([0, 10, 20, 60], ["", "", "", ""]),  # a few frames lost are no pause
        ([500, 510, 0, 10], ["", "", "reset", ""]),
        ([0, 10, 10, 20], ["", "", "repeated", ""]),
        ([0, 10, 8, 20], ["", "", "disordered", ""]),
        ([0, None, 20, None], ["", "missing", "", "missing"]),
        ([None, None, 500, 510], ["missing", "missing", "", ""]),
    ],
)
def test_what_is_odd_is_named(stamps: list[int | None], why: list[str]) -> None:
    shown = list(follow(enumerate(stamps), Clock("stamped", Fraction(10), Fraction(1, 100))))
    assert [frame.why for frame in shown] == why
    assert [round(frame.start, 3) for frame in shown] == sorted(round(frame.start, 3) for frame in shown)


def test_what_is_believed() -> None:
    tick = Fraction(1, 100)
    coded = [Stamp(number + 1, number) for number in range(20)]
    assert decide(coded, tick, Fraction(25), reorders=True).how == "ordered"
    assert decide(coded, tick, Fraction(25), reorders=False).how == "stamped"
    shuffled = [Stamp(pts, dts) for dts, pts in enumerate([1, 4, 2, 3, 7, 5, 6, 10, 8, 9])]
    assert decide(shuffled, tick, Fraction(100), reorders=True).how == "stamped"
    for stamps in ([Stamp(None, None)] * 9, [Stamp(0, 0)] * 9, [Stamp(number // 3, None) for number in range(30)]):
        clock = decide(stamps, tick, Fraction(25), reorders=False)
        assert clock.how == "counted" and clock.rate == 25 and "counted at 25" in clock.notes[0]
        with pytest.raises(DecodeError, match="neither time stamps nor a frame rate"):
            decide(stamps, tick, None, reorders=False)
    declared = decide(shuffled, tick, Fraction(100), reorders=True, declared=20.0)
    assert declared.how == "counted" and declared.rate == 20 and not declared.notes
    with pytest.raises(DecodeError, match="claims 2000 frames"):
        decide([Stamp(number, number) for number in range(20)], Fraction(1, 2000), None, reorders=False)


@given(st.lists(st.integers(1, 400), min_size=5, max_size=31), st.floats(1, 900))
def test_any_intervals_give_a_rate_between_the_shortest_and_the_longest(steps: list[int], claimed: float) -> None:
    stamps = [sum(steps[:number]) for number in range(len(steps) + 1)]
    clock = clock_of(stamps, Fraction(1, 1000), Fraction(claimed).limit_denominator(1000))
    low, high = 1000 / max(steps), 1000 / min(steps)
    assert clock.rate == Fraction(claimed).limit_denominator(1000) or low * 0.99 <= clock.rate <= high * 1.01
    assert math.isfinite(float(clock.rate))


@given(st.sampled_from([Fraction(5), Fraction(10), Fraction(24), Fraction(30)]), st.data(), st.integers(12, 32))
def test_an_uneven_camera_keeps_the_rate_of_its_header(rate: Fraction, data: st.DataObject, count: int) -> None:
    """Frames come early and late, by up to 40 % of an interval, or long and short by turns: the mean is the rate."""
    tick = Fraction(1, 16_000)
    if data.draw(st.booleans()):
        late = data.draw(st.lists(st.floats(-0.4, 0.4), min_size=count, max_size=count))
    else:
        late = [data.draw(st.floats(0, 0.8)) * (number % 2) for number in range(count)]
    stamps = [round((number + part) / float(rate) / tick) for number, part in enumerate(late)]
    clock = clock_of(stamps, tick, rate)
    assert clock.rate == rate and not clock.notes


@pytest.mark.parametrize(("claimed", "believed"), [(10, 10), (8, 8), (25, 10), (4, 10), (1000, 10)])
def test_a_header_that_no_mean_bears_out_is_not_believed(claimed: int, believed: int) -> None:
    """50 and 150 ms in turn are 10 a second. A rate of 8 would put the 32nd frame 0.8 s late."""
    stamps = [100 * number + 25 * (-1) ** number for number in range(32)]
    if claimed == 8:
        stamps = [125 * number for number in range(32)]
    assert clock_of(stamps, Fraction(1, 1000), Fraction(claimed)).rate == pytest.approx(believed, rel=0.03)
