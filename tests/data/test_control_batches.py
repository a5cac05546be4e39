"""Controls in batches: a clip's brightness tells its frame, and so does its control: they must agree at every frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from test_cache import MeanCodec, encode
from tiny_shards import CLIPS, FRAMES, HEIGHT, WIDTH, MakeShards, card_of, clip_parts
from typer.testing import CliRunner

from anyflow.cli.data import app
from anyflow.cli.data_controls import told_coverage
from anyflow.data.card import load_card
from anyflow.data.check import check_card
from anyflow.data.clip import Clip
from anyflow.data.control_ranges import MOST_ROWS, measured_controls, survey_controls
from anyflow.data.controls import Control
from anyflow.data.decode import Choice, ClipShape, decode_clip, usual_choice
from anyflow.data.describe import describe_card
from anyflow.data.module import VideoDataModule
from anyflow.data.shards import write_samples
from anyflow.errors import UserError
from anyflow.simulators import make
from anyflow.simulators.options import RenderOptions
from anyflow.simulators.simulated import simulator

PLACE = Control("brightness", 1)
STEP = Control("frames to the next", 1, at="transition", skipped="sum")
WANTED = {"place": PLACE, "step": STEP}


def told(number: int) -> dict[str, Any]:
    return {"place": [10 * number + frame for frame in range(FRAMES)], "step": [1] * FRAMES}


@pytest.fixture
def footage(make_shards: MakeShards) -> Path:
    """A folder of shards whose clips have controls, but for the second."""
    replaced = {number: clip_parts(number, controls=told(number)) for number in range(CLIPS) if number != 1}
    return make_shards(replaced)


def batches(folder: Path | list[Path], frames: int = 3, **options: Any) -> list[dict[str, Any]]:
    shape = {"frames": frames, "height": HEIGHT, "width": WIDTH}
    options = {"batch_size": 4, "steps": 6, "controls": WANTED, **options}
    data = VideoDataModule(folder, **shape, **options)  # type: ignore[arg-type]
    data.setup()
    return list(data.train_dataloader())


def agree(batch: dict[str, Any]) -> int:
    """Check the places by the pictures, and the steps by the places; return how many clips have controls."""
    controls, frames = batch["controls"], batch["frames"].shape[1]
    assert controls.dtype == torch.float32 and controls.shape == (len(batch["key"]), frames, 2)
    have = 0
    for key, values, pictures in zip(batch["key"], controls, batch["frames"], strict=True):
        if key.endswith("001"):
            assert values.isnan().all()
            continue
        have += 1
        bright = pictures.float().mean((1, 2, 3))
        assert torch.allclose(values[:, 0], bright, atol=2.6), (key, values[:, 0], bright)
        assert values[0, 1].isnan() and torch.equal(values[1:, 1], values[:, 0].diff())
    return have


@pytest.mark.parametrize("fps", [None, 4.0, 16.0, 6.0])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_controls_are_those_of_the_pictures(footage: Path, fps: float | None, num_workers: int) -> None:
    found = batches(footage, fps=fps, num_workers=num_workers)
    assert sum(map(agree, found)) >= 22
    starts = {int(v) % 10 for batch in found for v in batch["controls"][:, 0, 0].nan_to_num(9)} - {9}
    assert fps == 4.0 or len(starts) > 1, "clips start at several frames"


def test_without_controls_nothing_is_another(footage: Path, make_shards: MakeShards) -> None:
    for options in ({}, {"controls": None}, {"controls": {}}):
        plain = batches(footage, **{"controls": None, **options})
        for one, other in zip(batches(footage), plain, strict=True):
            assert "controls" not in other and list(one)[:-1] == list(other)
            assert torch.equal(one["frames"], other["frames"]) and one["key"] == other["key"]


def test_buckets_and_weights(footage: Path, make_shards: MakeShards) -> None:
    card = card_of(footage)
    other = make_shards({n: clip_parts(n, controls={"words": ["x"]}) for n in range(CLIPS)}, name="other/train")
    found = batches(card, 3, buckets=[(5, HEIGHT, WIDTH)], batch_size=4)  # type: ignore[arg-type]
    assert sum(map(agree, found)) > 0 and {batch["frames"].shape[1] for batch in found} <= {3, 5}
    mixed = batches([card, card_of(other)], weights=(1, 1), steps=12)
    known = [int((~batch["controls"][:, :, 0].isnan().all(1)).sum()) for batch in mixed]
    assert 12 < sum(known) < 36, "clips of the card without controls have NaN"


def test_streamed_tars(footage: Path) -> None:
    found = batches(footage, streaming=True)
    for batch in found:
        batch["key"] = [key.rpartition("/")[2] for key in batch["key"]]
    assert sum(map(agree, found)) > 12


@pytest.mark.parametrize("fps", [None, 4.0, 16.0, 5.0])
def test_cached_latents_have_the_controls_of_the_frames_that_were_encoded(footage: Path, fps: float | None) -> None:
    shape = ClipShape(3, HEIGHT, WIDTH, fps)
    folder = encode(footage, MeanCodec(), (shape,))
    found = batches(footage, fps=fps, cache=[folder])
    for batch in found:
        assert batch["controls"].shape == (4, 3, 2)
        for key, values in zip(batch["key"], batch["controls"], strict=True):
            first = values[:, 0] - 10 * int(key[-3:])
            chosen = usual_choice(8, shape)
            assert torch.equal(first, torch.tensor(chosen).float()) or key.endswith("001")


def test_a_cache_notes_the_frames_only_where_the_rate_does_not_tell_them(make_shards: MakeShards) -> None:
    wrong = {n: clip_parts(n, controls=told(n), fps=[8, None, 12][n % 3]) for n in range(CLIPS)}
    folder = encode(make_shards(wrong), MeanCodec(), (ClipShape(3, HEIGHT, WIDTH, 4.0),))
    tars = b"".join(path.read_bytes() for path in sorted(folder.glob("*.tar")))
    assert tars.count(b"chosen_frames") == sum(n % 3 > 0 for n in range(CLIPS))
    for batch in batches(folder, fps=4.0, cache=[folder]):
        for key, values in zip(batch["key"], batch["controls"], strict=True):
            assert (values[:, 0] - 10 * int(key[-3:])).tolist() == [0, 2, 4]


def test_a_clip_of_another_width_or_length_is_replaced_and_named(make_shards: MakeShards) -> None:
    replaced = {number: clip_parts(number, controls=told(number)) for number in range(CLIPS) if number != 1}
    replaced[3] = clip_parts(3, controls={"place": [[1, 2]] * FRAMES})
    replaced[4] = clip_parts(4, controls={"step": [1] * 3})
    with pytest.raises(UserError, match=r"clip-003 \(its place have 2 numbers|clip-004 \(its step have 3 entries"):
        batches(make_shards(replaced), steps=12)
    found = batches(make_shards(replaced, name="again"), steps=12, error_budget=0.2)
    assert {skip["key"] for batch in found for skip in batch["skipped"]} == {"clip-003", "clip-004"}
    assert all(agree(batch) == 4 - sum(key.endswith("001") for key in batch["key"]) for batch in found)


@pytest.mark.parametrize("fps", [3.0, 8.0, 10.0, 24.0])
def test_the_choice_is_told_and_usual(fps: float) -> None:
    shape, choice = ClipShape(2, HEIGHT, WIDTH, fps), Choice()
    pictures = decode_clip(clip_parts(2)["mp4"], shape, choice=choice)
    assert choice.frames == FRAMES and choice.numbers == usual_choice(8, shape)
    assert np.allclose(pictures.mean((1, 2, 3)) - 20, choice.numbers, atol=1.1)


def test_ranges_are_of_all_clips_or_of_some_that_their_keys_choose(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = {number: clip_parts(number, controls=told(number)) for number in range(CLIPS)}
    card = load_card(card_of(make_shards(parts), controls={"place": PLACE, "step": "words"}))
    values = np.concatenate([told(number)["place"] for number in range(CLIPS)])
    found, notes = measured_controls(card)
    place = found["place"]
    assert isinstance(place, Control) and place.holds == "brightness"
    assert np.allclose([place.low[0], place.high[0]], np.quantile(values, [0.01, 0.99]), rtol=1e-5)
    assert found["step"] == Control("words", 1, low=(1.0,), high=(1.0,))
    assert len(notes) == 1 and "'step' was guessed" in notes[0]
    monkeypatch.setattr("anyflow.data.control_ranges.MOST_CLIPS", 6)
    some = survey_controls(card, "train", card.controls)[0]["place"]
    order = [(f"clip-{n:03d}", parts[n]) for n in reversed(range(CLIPS))]
    write_samples(order, tmp_path / "again", "turned", per_shard=5)
    turned = survey_controls(replace(card, splits={"train": tmp_path / "again"}), "train", card.controls)[0]["place"]
    assert some.clips == turned.clips == 6
    rows = [sorted(np.concatenate(one.rows[1]).ravel().tolist()) for one in (some, turned)]
    assert rows[0] == rows[1] and len(rows[0]) == 6 * FRAMES <= 6 * MOST_ROWS


def test_what_stays_in_words(make_shards: MakeShards) -> None:
    same = {"keys": [["w"]] * FRAMES, "none": [[]] * FRAMES}
    cars = {n: clip_parts(n, controls={"cars": [[1.0] * (3 + n % 2)] * FRAMES, **same}) for n in range(CLIPS)}
    found, notes = measured_controls(load_card(card_of(make_shards(cars), controls={"cars": "of every car"})))
    assert found == {"cars": "of every car", "keys": "one entry a frame", "none": "one entry a frame"}
    assert "clips have 3 to 4 numbers a frame" in notes[0] and "no number" in notes[1]


def test_the_command_writes_a_card_that_show_and_check_then_tell(footage: Path) -> None:
    card = card_of(footage, controls={"place": "how bright"})
    runner = CliRunner()
    result = runner.invoke(app, ["controls", str(card)])
    assert result.exit_code == 0, result.output
    assert "control 'place' was guessed" in result.output and f"written to {card}" in result.output
    made = load_card(card).controls
    assert {name: control.width for name, control in made.items() if isinstance(control, Control)} == {
        "place": 1,
        "step": 1,
    }
    before = card.read_text()
    assert runner.invoke(app, ["controls", str(card), "--json"]).exit_code == 0 and card.read_text() == before
    shown = runner.invoke(app, ["show", str(card), "--count", "0"]).output
    assert "in 22 of 23 clips read" in shown and "|" in shown and "█" in shown
    facts = json.loads(runner.invoke(app, ["show", str(card), "--count", "0", "--json"]).output)
    part = facts["splits"]["train"]["controls"]["place"]["numbers"][0]
    assert sum(part["counts"]) == 22 * FRAMES and part["from"] == made["place"].low[0]  # type: ignore[union-attr]
    assert check_card(card) == []


def test_check_names_controls_that_do_not_fit(make_shards: MakeShards) -> None:
    odd: dict[int, dict[str, Any]] = {
        2: {"place": [1] * (FRAMES + 1)},
        3: {"place": [[1, 1]] * FRAMES},
        4: {"place": [0, 0, 1e5, 0, -1e5]},
        5: {"keys": [2] * FRAMES},
        6: {"place": [0, 0, 900, 0, 0], "step": [1] * (FRAMES - 1)},
        7: {"words": [1]},
    }
    folder = make_shards({n: clip_parts(n, controls=odd.get(n, told(n))) for n in range(CLIPS)})
    ranged = Control("brightness", 1, numbers=("bright",), low=(0.0,), high=(200.0,))
    keys = Control("keys", 1, "multi-hot")
    problems = check_card(card_of(folder, controls={"place": ranged, "step": STEP, "keys": keys, "words": "w"}))
    told_of = {problem.split("'")[1]: problem for problem in problems}
    assert sorted(told_of) == [f"clip-{n:03d}" for n in (2, 3, 4, 5, 7)] and len(problems) == 5
    assert "have 6 entries, the clip 5 frames" in told_of["clip-002"]
    assert "in 2 of 5 entries: bright is 100000, the range 0 to 200" in told_of["clip-004"]
    assert "other numbers than 0 and 1" in told_of["clip-005"]


def test_the_statistics_leave_out_what_check_names(make_shards: MakeShards) -> None:
    """Catches a crash over a clip that has no entries, and a plot of clips that training will not take."""
    nan, half = [[float("nan")]] * FRAMES, [0, 0, 9, 9, 9]
    odd: dict[int, dict[str, Any]] = {
        1: {"place": [], "keys": [0] * FRAMES},
        2: {"place": [5] * (FRAMES + 1), "keys": [0] * FRAMES},
        3: {"place": half, "keys": [2] * FRAMES},
        4: {"place": nan, "keys": [0] * FRAMES},
    }
    folder = make_shards({n: clip_parts(n, controls=controls) for n, controls in odd.items()})
    place, keys = Control("brightness", 1, low=(0.0,), high=(5.0,)), Control("keys", 1, "multi-hot")
    card = load_card(card_of(folder, controls={"place": place, "keys": keys}))
    found = describe_card(card)["splits"]["train"]["controls"]
    assert {name: (of["clips"], of["misfits"]) for name, of in found.items()} == {"place": (4, 2), "keys": (4, 1)}
    [number] = found["place"]["numbers"]
    assert (number["unknown"], number["beyond"], number["still"]) == (0.5, 0.6, False)
    assert found["keys"]["numbers"][0]["still"]
    assert list(told_coverage("place", found["place"]))[1].endswith("(60% beyond, 50% not known)")
    assert list(told_coverage("keys", found["keys"]))[1].endswith("(never changes)")
    assert any("2 of 4 clips do not fit (its place have 0 entries" in note for note in measured_controls(card)[1])


def test_places_ascend() -> None:
    for fps in (1.0, 7.5, 29.97, 60.0):
        chosen = usual_choice(24, ClipShape(40, 8, 8, fps))
        assert len(chosen) == 40 and all(a <= b for a, b in pairwise(chosen))


class Source:
    """Stands for a simulator whose clips have controls."""

    CONTROLS: ClassVar[dict[str, Control | str]] = WANTED
    DESCRIPTION, LICENCE, FPS, PACKAGES, LOOKS, ATTRIBUTES = "Grey.", "MIT", 8.0, (), {"grey": None}, {}

    def render(self, count: int, split: str, seed: int, workers: int, look: str | None) -> Iterator[Clip]:
        for number in range(count):
            parts = clip_parts(number, controls=told(number))
            yield Clip.from_parts(f"{split}-{number}", parts)


def test_a_simulators_card_has_the_ranges_of_what_was_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "simulator", lambda domain: Source())
    card = load_card(make.make_dataset("grey", RenderOptions(4, 2), tmp_path / "set"))
    place, step = card.controls["place"], card.controls["step"]
    assert isinstance(place, Control) and 0 <= place.low[0] < 1 and 33 < place.high[0] <= 34
    assert step == replace(STEP, low=(1.0,), high=(1.0,))


@pytest.mark.parametrize("part", ["", "-uncaptioned", "-full"])
@pytest.mark.parametrize("domain", ["driving", "driving-open", "robotics", "games"])
def test_a_shipped_card_tells_what_its_simulator_and_its_clips_have(domain: str, part: str) -> None:
    path = Path(__file__).parents[2] / "data" / f"{domain}{part}.yaml"
    if domain == "driving-open" and part == "-uncaptioned":
        assert not path.exists()
        return
    starter = load_card(domain)
    assert load_card(path, require_shards=False).controls == measured_controls(starter)[0] == starter.controls
    of = {k: replace(c, low=(), high=()) if isinstance(c, Control) else c for k, c in starter.controls.items()}
    assert of == simulator(domain).CONTROLS
