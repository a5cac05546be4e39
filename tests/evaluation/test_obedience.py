"""Obedience: what another clip's controls change, against what an obedient model would make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import BlockCodec, exact_sampler, held_out, measure_curve
from numpy.typing import NDArray
from scenes import grip, lane_change
from torch import Tensor

from anyflow.evaluation.curve import Curve, HeldOut
from anyflow.evaluation.obedience import path_figures, swap_gap, swap_partners
from anyflow.evaluation.report.tables import comparison_markdown, comparison_text
from anyflow.evaluation.retention import few_step_ratio, retention
from anyflow.evaluation.told import Told
from anyflow.simulators.motion import PROBES, TOLERANCE, Reading, path_tolerance


def told(frames: NDArray[np.uint8], domain: str = "driving", number: float = 1.0) -> HeldOut:
    return HeldOut("key", "a", torch.from_numpy(frames), domain, controls=torch.full((len(frames), 1), number))


def reading(path: NDArray[np.float64]) -> Reading:
    return Reading("keep", 1.0, path)


def paths(seed: int, count: int = 4) -> list[NDArray[np.float64]]:
    """Walks that begin anywhere."""
    random = np.random.default_rng(seed)
    return [random.normal(size=(17, 2)).cumsum(0) + 20 * random.normal(size=2) for _ in range(count)]


LEFT_LANE, MIDDLE, RIGHT_LANE = 14.0, 32.0, 50.0


def test_partners_lead_where_an_obedient_model_can_follow() -> None:
    """A car in the leftmost lane cannot change to the left: nobody drives there. Another one can."""
    to_the_right, to_the_left = lane_change(18.0, start=LEFT_LANE), lane_change(-18.0, start=RIGHT_LANE)
    keeps = lane_change(0.0, start=LEFT_LANE)
    items = [told(clip) for clip in (to_the_right, to_the_left, keeps)]
    assert swap_partners(items) == [2, 2, 0]
    free = told(lane_change(18.0, start=MIDDLE))
    assert swap_partners([*items, free]) == [2, 2, 0, 1]


def test_there_is_nothing_to_swap_without_a_path_or_controls() -> None:
    clip = told(lane_change(18.0))
    other = told(lane_change(0.0))
    assert swap_partners([clip]) is None
    assert swap_partners([clip, clip]) is None, "they go the same way"
    assert swap_partners([clip, replace(other, controls=None)]) is None
    assert swap_partners([replace(item, domain="cooking") for item in (clip, other)]) is None
    places = np.stack([np.linspace(30, 60, 17), np.full(17, 30.0)], axis=1)
    arms = [told(grip(places), "robotics"), told(grip(places[:1].repeat(17, 0)), "robotics")]
    assert swap_partners([clip, arms[0], other, arms[1]]) == [2, 3, 0, 1], "a partner is of the same domain"
    unknown = replace(other, controls=torch.full((17, 1), float("nan")))
    assert swap_partners([clip, other, unknown]) == [1, 0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_is_a_model_that_goes_its_partners_way_from_its_own_place(seed: int) -> None:
    asked, starts = paths(seed), paths(seed + 100)
    partners = [1, 2, 3, 0]
    own = [reading(path - path[0] + begin[0]) for path, begin in zip(asked, starts, strict=True)]
    swapped = [
        reading(asked[other] - asked[other][0] + begin[0]) for other, begin in zip(partners, starts, strict=True)
    ]
    known = [reading(path) for path in asked]
    gap, obedience = swap_gap(own, swapped, known, partners)
    assert obedience == pytest.approx(1) and gap is not None and gap > 0
    assert swap_gap(own, own, known, partners) == pytest.approx((0, 0))
    halfway = [reading((one.path + other.path) / 2) for one, other in zip(own, swapped, strict=True)]
    assert swap_gap(own, halfway, known, partners)[1] == pytest.approx(0.5)
    assert swap_gap(own, swapped, known, [0, 1, 2, 3]) == (None, None)
    some = swap_gap([own[0], *own[1:]], [*swapped[:3], None], known, partners)
    assert some[1] == pytest.approx(1), "the reference is that of the clips that could be read"


def test_a_path_ends_right_within_its_domains_tolerance() -> None:
    items = held_out(4)
    asked = [reading(np.zeros((17, 2)))] * 4
    within = path_tolerance("driving", 64, 96)
    aside = np.zeros((17, 2))
    aside[-1, 1] = within + 0.1
    near = aside * 0.9
    found = path_figures([reading(near), reading(aside), None, asked[0]], asked, items, (64, 96))
    assert found["path_right"] == 0.5, "what cannot be followed is wrong"
    assert found["path_end_error"] == pytest.approx((0.9 + 1) * (within + 0.1) / 3)
    assert path_figures([None] * 4, [None] * 4, items, (64, 96)) == {"path_end_error": None, "path_right": None}
    assert set(TOLERANCE) == set(PROBES)
    assert path_tolerance("driving", 128, 96) == 2 * within and path_tolerance("games", 64, 192) == pytest.approx(19.2)


def curves() -> tuple[Curve, Curve]:
    """Of a model that ignores its controls, and of one that obeys."""
    items = held_out(6)
    captions = [item.caption for item in items]
    clips = [
        replace(item, controls=torch.full((len(item.frames), 1), float(place))) for place, item in enumerate(items)
    ]
    exact = exact_sampler(items)

    def obeys(asked: Told, *arguments: object) -> Tensor:
        assert asked.controls is not None
        return exact(Told([captions[int(number)] for number in asked.controls[:, 0, 0]]), *arguments)

    deaf, obedient = (
        measure_curve(sampler, BlockCodec(), clips, held_out(6, offset=6), label=label, steps=(4, 8)).curve
        for sampler, label in ((exact, "before"), (obeys, "after"))
    )
    return deaf, obedient


def test_the_report_says_in_words_whether_the_model_obeys() -> None:
    deaf, obedient = curves()
    assert [row.obedience for row in deaf.rows] == [0, 0]
    assert [row.obedience for row in obedient.rows] == pytest.approx([1, 1], abs=0.02)
    assert obedient.real.obedience == 1 and obedient.rows[0].path_right == 1
    assert obedient.rows[0].path_end_error == pytest.approx(0, abs=0.05)
    text, page = comparison_text(deaf, obedient), comparison_markdown(deaf, obedient)
    away = f"the {obedient.real.swap_gap:.1f} px that another clip's controls lead away, samples go, at steps"
    for told_in in (text, page):
        assert f"before: the model ignores its controls: of {away} 4: 0 %, 8: 0 %" in told_in
        assert f"after: of {away} 4: 100 %, 8: 100 %" in told_in
    assert "obedience: few-step ratio" not in text, "a model that obeys never has no ratio"
    assert "Path right: it ends within 4.5 px (driving)" in page


def test_obedience_has_a_few_step_ratio_and_a_retention() -> None:
    _, before = curves()
    half = replace(before.rows[0], obedience=0.5, path_right=0.5)
    after = replace(before, rows=(half, before.rows[1]))
    for name in ("obedience", "path_right"):
        found = few_step_ratio(after, name), retention(before, after, name)
        assert [estimate and round(estimate.mean, 2) for estimate in found] == [2.0, 0.5]
    text = comparison_text(before, after)
    assert "obedience: few-step ratio 1.00 → 2.00, retention 0.50" in text
    assert "at 4 it ignores" not in text
    lost = replace(before, rows=(replace(half, obedience=0.02), before.rows[1]))
    assert "at 4 it ignores its controls" in comparison_text(None, lost)
