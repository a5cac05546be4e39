"""The probe of controls: it reads what can be seen, says what it cannot, and judges samples by the former alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BlockCodec, exact_sampler, measure_curve
from torch import Tensor

from anyflow.data.controls import Control
from anyflow.evaluation.control_probe import (
    ControlProbe,
    ControlProbeSettings,
    agreement,
    are_keys,
    normalised,
    read_labels,
    train_control_probe,
)
from anyflow.evaluation.curve import HeldOut
from anyflow.evaluation.measurement import Judges
from anyflow.evaluation.report.tables import comparison_markdown, comparison_text
from anyflow.evaluation.told import Told

CONTROLS = {
    "place": Control("where the light is", 1, numbers=("x",), low=(0.0,), high=(40.0,)),
    "keys": Control("whether the floor shines", 1, kind="multi-hot"),
    "noise": Control("nothing shows it", 1, low=(-2.0,), high=(2.0,)),
    "still": Control("never changes", 1, low=(5.0,), high=(5.0,)),
}
SMALL = ControlProbeSettings(16, 48, channels=(12, 16), features=24, frames_seen=8_000, batch_size=8)
FRAMES = 5


def clip(number: int) -> HeldOut:
    """A light that moves over a dark floor, which shines while a key is held."""
    random = np.random.default_rng(number)
    x = (random.uniform(0, 40) + np.cumsum(random.normal(0, 3, FRAMES))).clip(0, 40)
    key = random.integers(0, 2, FRAMES)
    frames = np.full((FRAMES, 16, 48, 3), 40, np.uint8)
    for frame, place, held in zip(frames, x.round().astype(int), key, strict=True):
        frame[10:] = 160 if held else 40
        frame[2:8, place : place + 8] = 240
    controls = np.stack([x, key, random.normal(size=FRAMES), np.full(FRAMES, 5.0)], axis=1).astype(np.float32)
    controls[0, 1] = np.nan
    return HeldOut(
        f"clip-{number}", f"light {number}", torch.from_numpy(frames), "lights", {}, torch.from_numpy(controls)
    )


TRAIN, REAL = [clip(number) for number in range(64)], [clip(number) for number in range(500, 524)]


@pytest.fixture(scope="module")
def probe() -> ControlProbe:
    return train_control_probe(TRAIN, REAL, CONTROLS, SMALL)


def test_it_reads_what_can_be_seen_and_says_what_it_cannot(probe: ControlProbe) -> None:
    assert probe.trusted.tolist() == [True, True, False, False]
    assert probe.reached[3] != probe.reached[3], "what never changes cannot be judged"
    used, left = probe.notes()
    assert "place.x (0." in used and "keys (" in used and "%" in used
    assert "noise (" in left and "still (does not change)" in left and "no figure uses them" in left


def test_the_same_seed_makes_the_same_probe(probe: ControlProbe) -> None:
    torch.rand(7)
    again = train_control_probe(TRAIN, REAL, CONTROLS, SMALL)
    assert again.reached[:3] == probe.reached[:3]


def test_figures_are_of_what_is_trusted(probe: ControlProbe) -> None:
    clips = torch.stack([item.frames for item in REAL])
    right = probe.accuracies(clips, REAL)
    assert right["control_correlation"] > 0.9 and right["key_states_right"] > 0.9
    others = probe.accuracies(clips.roll(1, 0), REAL)
    assert others["control_correlation"] < 0.5 and others["key_states_right"] < 0.7
    assert probe.accuracies(clips, [replace(item, controls=None) for item in REAL]) == {}
    blind = ControlProbe(probe.network, SMALL, CONTROLS, [0.5] * 4)
    assert blind.accuracies(clips, REAL) == {} and blind.partners(REAL) is None
    assert [line.split(":")[0] for line in blind.notes()] == ["controls that cannot be read back from pixels"]
    assert blind.notes()[0].endswith("and whether a model obeys is not known")


def test_agreement_is_correlation_or_the_share_of_right_states() -> None:
    asked = torch.tensor([[[1.0, 0.0], [2.0, 1.0], [3.0, 1.0], [float("nan"), float("nan")]]])
    read = torch.tensor([[[2.0, 0.0], [4.0, 0.0], [6.0, 1.0], [0.0, 0.0]]])
    is_key = torch.tensor([False, True])
    torch.testing.assert_close(agreement(read, asked, is_key), torch.tensor([1.0, 2 / 3]))
    torch.testing.assert_close(agreement(-read, asked, is_key)[0], torch.tensor(-1.0))


def test_numbers_are_normalised_as_networks_are_told_them() -> None:
    rows = torch.tensor([[0.0, 1.0, -2.0, 5.0], [40.0, 0.0, 99.0, 6.0]])
    assert normalised(rows, CONTROLS).tolist() == [[-1, 1, -1, 0], [1, 0, 3, 1]]


def test_an_angle_is_read_as_sine_and_cosine() -> None:
    """Catches one that is read right at 179 degrees, and counts as a whole range wrong for being told -179."""
    controls = {
        "roll": Control("an angle", 1, low=(-180.0,), high=(180.0,), period=(360.0,)),
        "keys": CONTROLS["keys"],
    }
    told = normalised(torch.tensor([[180.0, 1.0], [-180.0, 0.0], [90.0, 1.0]]), controls)
    torch.testing.assert_close(told, torch.tensor([[0.0, 1, -1], [0, 0, -1], [1, 1, 0]]), atol=1e-6, rtol=0)
    assert are_keys(controls).tolist() == [False, True, False]
    assert read_labels(controls) == ["roll (sine)", "keys", "roll (cosine)"]


def test_a_key_that_is_never_read_better_than_by_guessing_reaches_nothing() -> None:
    """Held in one frame of thirty: always off is right in 97 %, and no reading."""
    controls = {"jump": Control("a key that nothing shows", 1, kind="multi-hot")}
    clips = []
    for item in TRAIN[:32]:
        keys = torch.zeros(FRAMES, 1)
        keys[2] = float(int(item.key.split("-")[1]) % 6 == 0)
        clips.append(replace(item, controls=keys))
    made = train_control_probe(clips[:16], clips[16:], controls, replace(SMALL, frames_seen=200))
    assert not made.trusted.any()


def test_it_is_kept_whole_or_not_at_all(probe: ControlProbe, tmp_path: Path) -> None:
    assert ControlProbe.load(tmp_path, CONTROLS) is None
    probe.save(tmp_path)
    loaded = ControlProbe.load(tmp_path, CONTROLS)
    clips = torch.stack([item.frames for item in REAL])
    assert loaded is not None and torch.equal(loaded.read(clips), probe.read(clips))
    assert torch.equal(loaded.trusted, probe.trusted) and loaded.notes() == probe.notes()


def test_where_motion_is_not_read_the_probe_says_whether_a_model_obeys(probe: ControlProbe) -> None:
    """Of a model that does what it is told most of the whole; of a deaf one nothing, in words too."""
    items, reference = REAL[:6], REAL[6:12]
    by_place = {float(item.controls[0, 0]): item.caption for item in items}  # type: ignore[index]
    exact = exact_sampler(items)

    def obeys(asked: Told, *arguments: Any) -> Tensor:
        assert asked.controls is not None
        return exact(Told([by_place[float(number)] for number in asked.controls[:, 0, 0]]), *arguments)

    options: dict[str, Any] = {"steps": (4, 8), "judges": Judges(labels=[probe], notes=probe.notes(), controls=probe)}
    obedient = measure_curve(obeys, BlockCodec(), items, reference, **options).curve
    deaf = measure_curve(exact, BlockCodec(), items, reference, **options).curve
    assert obedient.rows[0].obedience == pytest.approx(1, abs=0.25)
    assert obedient.rows[0].figure("control_gap") == pytest.approx(obedient.real.figure("control_gap"), rel=0.05)
    assert obedient.rows[0].more["control_correlation"] > 0.9
    assert [row.obedience for row in deaf.rows] == [0, 0] and deaf.rows[0].swap_gap is None
    assert "the model ignores its controls: of the" in comparison_text(None, deaf)
    assert "half ranges of their controls that another clip's" in comparison_text(None, obedient)
    assert "Control gap: how much farther" in comparison_markdown(None, obedient)
    assert "control correlation: few-step ratio" in comparison_text(None, obedient)
    unread = measure_curve(exact, BlockCodec(), items, reference, steps=(1,)).curve
    assert unread.rows[0].obedience is None
