"""The probe: what it learns, that it says how good it is, and that it is not used where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow.errors import UserError
from anyflow.evaluation.curve import HeldOut
from anyflow.evaluation.further_judges import judges_of
from anyflow.evaluation.heldout import Prompts
from anyflow.evaluation.measurement import Judges
from anyflow.evaluation.probe import Probe, ProbeNetwork, ProbeSettings, labels_of, pictures, train_probe

SMALL = ProbeSettings(frames=3, height=16, width=24, channels=(8, 16), features=8, epochs=12, batch_size=16)


def clip(number: int, **attributes: Any) -> HeldOut:
    """Red or blue, brighter on one side; whether it is "lucky" nothing shows."""
    generator = torch.Generator().manual_seed(number)
    colour, side = ("red", "blue")[number % 2], ("left", "right")[number // 2 % 2]
    frames = torch.randint(40, 90, (5, 16, 24, 3), generator=generator)
    frames[..., 0 if colour == "red" else 2] += 100
    frames[:, :, : 12 if side == "left" else None] += 0 if side == "right" else 60
    if side == "right":
        frames[:, :, 12:] += 60
    lucky = ("yes", "no")[int(torch.randint(2, (1,), generator=generator))]
    labels = {"colour": colour, "side": side, "lucky": lucky, "number": number, "path": [1, 2], **attributes}
    return HeldOut(f"clip-{number}", "a light", frames.byte(), "lights", labels)


TRAIN, REAL = [clip(number) for number in range(96)], [clip(number) for number in range(200, 248)]


@pytest.fixture(scope="module")
def probe() -> Probe:
    return train_probe(TRAIN, REAL, SMALL)


def test_a_probe_learns_what_can_be_seen_and_says_what_it_cannot(probe: Probe) -> None:
    assert set(probe.labels) == {"colour", "side", "lucky"}, "neither numbers nor lists are labels"
    assert probe.accuracy["colour"] >= 0.95 and probe.accuracy["side"] >= 0.95
    assert probe.accuracy["lucky"] < 0.9
    assert any("lucky" in note and "not used" in note for note in probe.notes())
    assert any("colour" in note and "not used" not in note for note in probe.notes())


def test_only_trusted_labels_judge_and_only_clips_of_the_domain(probe: Probe) -> None:
    asked = REAL[:8]
    clips = torch.stack([item.frames for item in asked])
    assert probe.accuracies(clips, asked) == {"probe_colour_right": 1.0, "probe_side_right": 1.0}
    swapped = [replace(item, attributes={**item.attributes, "colour": "red"}) for item in asked]
    assert probe.accuracies(clips, swapped)["probe_colour_right"] == 0.5
    assert probe.accuracies(clips, [replace(item, domain="other") for item in asked]) == {}
    unlabelled = [replace(item, attributes={}) for item in asked[:4]] + asked[4:]
    assert probe.accuracies(clips, unlabelled)["probe_side_right"] == 1.0


def test_features_tell_sets_apart(probe: Probe) -> None:
    from anyflow.evaluation.distance import kernel_distance

    red, blue = (torch.stack([item.frames for item in REAL if item.attributes["colour"] == c]) for c in ("red", "blue"))
    features = probe(red)
    assert features.shape == (24, 8) and features.dtype == torch.float64
    assert kernel_distance(probe(red[:12]), probe(blue[:12])) > 5 * abs(
        kernel_distance(probe(red[:12]), probe(red[12:]))
    )


def test_a_probe_is_kept_whole_or_not_at_all(probe: Probe, tmp_path: Path) -> None:
    assert Probe.load(tmp_path) is None
    probe.save(tmp_path)
    loaded = Probe.load(tmp_path)
    clips = torch.stack([item.frames for item in REAL])
    assert loaded is not None and loaded.read(clips) == probe.read(clips)
    assert (loaded.accuracy, loaded.labels, loaded.settings) == (probe.accuracy, probe.labels, probe.settings)
    (tmp_path / "probe.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="delete it"):
        Probe.load(tmp_path)


def test_the_same_seed_gives_the_same_probe_and_leaves_the_global_draws_alone(probe: Probe) -> None:
    quick = replace(SMALL, epochs=1)
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    first, second = (train_probe(TRAIN, REAL, quick).network.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), before)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_labels_need_two_values_with_enough_clips() -> None:
    rare = [clip(number, kind="a" if number else "b", one="same") for number in range(40)]
    assert set(labels_of(rare)) == {"colour", "side", "lucky"}
    with pytest.raises(UserError, match="nothing to learn"):
        train_probe([replace(item, attributes={}) for item in TRAIN], REAL, SMALL)


def test_clips_of_any_size_become_one_shape() -> None:
    assert pictures(torch.zeros(2, 81, 48, 80, 3, dtype=torch.uint8), SMALL).shape == (2, 9, 16, 24)
    assert pictures(torch.full((1, 5, 16, 24, 3), 255, dtype=torch.uint8), SMALL).unique().tolist() == [1.0]


def test_a_data_sets_probe_is_trained_once_for_each_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow.data.decode import ClipShape
    from anyflow.evaluation import probe as probes

    trained: list[tuple[str, str]] = []

    def train(clips: str, real: str, settings: ProbeSettings, on_progress: None) -> Probe:
        trained.append((clips, real))
        labels = {"colour": ["blue", "red"]}
        return Probe(ProbeNetwork(settings, labels), settings, "driving", labels, {"colour": 1.0})

    monkeypatch.setattr(probes, "held_out", lambda cards, split, shape: split)
    monkeypatch.setattr(probes, "train_probe", train)
    for shape in (ClipShape(17, 64, 96), ClipShape(17, 64, 96), ClipShape(5, 64, 96)):
        made = probes.probe_of("driving", shape, settings=SMALL, root=tmp_path)
        assert made.accuracy == {"colour": 1.0}
    assert trained == [("train", "heldout")] * 2
    probes.probe_of("driving", ClipShape(17, 64, 96), settings=replace(SMALL, seed=1), root=tmp_path)
    assert len(trained) == 3 and len(list(tmp_path.glob("*/probe.json"))) == 3
    monkeypatch.chdir(tmp_path)
    prompts = Prompts(["driving", "games"], ClipShape(17, 64, 96), 1)
    both = judges_of(["probe"], "--encoder", prompts)
    assert len(trained) == 5 and len(both.labels) == 2 and not both.extractors and len(both.notes) == 2
    one = replace(prompts, cards=["driving"])
    alone = judges_of(["probe"], "--encoder", one)
    assert len(trained) == 5 and [judge.name for judge in alone.extractors] == ["probe"]
    assert judges_of([], "--encoder", one) == Judges([], [], [])
