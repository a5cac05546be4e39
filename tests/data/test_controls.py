"""Controls: what a card may say of them, and their values at the frames that a clip takes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tiny_shards import MakeShards, card_of, clip_parts

from anyflow.data.batches import ClipDataset
from anyflow.data.card import load_card, write_card
from anyflow.data.card_controls import write_controls
from anyflow.data.controls import Control, control_rows, control_values
from anyflow.data.decode import ClipShape, DecodeError
from anyflow.data.order import Order
from anyflow.data.reader import ShardReader, find_split
from anyflow.data.wanted import learnt_controls, wanted_controls
from anyflow.errors import UserError

STATE = Control("a state", 2)
PUSH = Control("a displacement", 1, at="transition", skipped="sum")
SPEED = replace(PUSH, skipped="mean")
TARGET = replace(PUSH, skipped="last")
KEYS = Control("keys", 2, "multi-hot", at="transition")

numbers = st.floats(-1e6, 1e6, width=32) | st.integers(-100, 100) | st.booleans()
texts = st.text("abcxyz", min_size=1, max_size=8)


@st.composite
def controls(draw: st.DrawFn) -> Control:
    width = draw(st.integers(1, 4))
    some = lambda item, **more: tuple(draw(st.lists(item, min_size=width, max_size=width, **more)))  # noqa: E731
    low = some(st.floats(-1e6, 0)) if draw(st.booleans()) else ()
    kind = draw(st.sampled_from(["continuous", "multi-hot"]))
    skipped = draw(st.sampled_from(["last", "mean", "sum"])) if kind == "continuous" else "last"
    goes_round = kind == "continuous" and skipped == "last" and draw(st.booleans())
    return Control(
        draw(texts),
        width,
        kind,
        unit=some(texts) if draw(st.booleans()) else (),
        numbers=some(texts, unique=True) if draw(st.booleans()) else (),
        at=draw(st.sampled_from(["frame", "transition"])),
        skipped=skipped,
        period=some(st.sampled_from([0.0, 6.28319, 360.0])) if goes_round else (),
        low=low,
        high=some(st.floats(0, 1e6)) if low else (),
    )


@given(st.dictionaries(texts, controls() | texts, max_size=4))
def test_a_card_that_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, told: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("card")
    (folder / "train").mkdir()
    path = card_of(folder / "train", controls=told)
    loaded = load_card(path, require_shards=False)
    assert loaded.controls == told and list(loaded.controls) == list(told)
    text = path.read_text()
    write_card(loaded, path)
    assert path.read_text() == text


WRONG = [
    ({"width": 2}, "missing key 'controls.act.holds'"),
    ({"width": 0}, "controls.act.width=0 must be more than 0"),
    ({"width": 2, "low": [1], "high": [1, 2]}, r"controls.act.low has 1 values where width=2: give one for each"),
    ({"width": 2, "unit": ["m"]}, "controls.act.unit has 1 values where width=2"),
    ({"width": 1, "unit": "m"}, "controls.act.unit='m' is not of the right type: give a list, each item a text"),
    ({"width": 1, "low": [0.0]}, "controls.act.high is missing"),
    ({"width": 1, "low": [2], "high": [1]}, r"controls.act.low\[0\]=2 and high\[0\]=1: give finite ones"),
    ({"width": 1, "low": [0], "high": [float("inf")]}, r"high\[0\]=inf: give finite ones"),
    (
        {"width": 1, "kind": "binary"},
        "controls.act.kind='binary' is not of the right type: give continuous or multi-hot",
    ),
    ({"width": 1, "at": "start"}, "give frame or transition"),
    ({"width": 2, "numbers": ["a", "a"]}, "names one twice"),
    ({"width": 2, "period": [360]}, "controls.act.period has 1 values where width=2"),
    ({"width": 1, "period": [-360]}, r"period=\[-360.0\]: give the length of a whole turn"),
    ({"width": 1, "period": [360], "skipped": "mean"}, "skipped=mean: what goes round is continuous, skipped 'last'"),
    ({"width": 1, "period": [1], "kind": "multi-hot"}, "kind=multi-hot: what goes round is continuous"),
    ({"width": 1, "kind": "multi-hot", "skipped": "sum"}, "a multi-hot control takes 'last' alone"),
    ({"width": 1, "widht": 2}, "unknown key 'controls.act.widht': did you mean 'width'"),
    ([1, 2], r"controls.act=\[1, 2\] is not of the right type: give keys with values or a text"),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG)
def test_a_mistake_is_one_sentence(tmp_path: Path, fields: Any, sentence: str) -> None:
    if isinstance(fields, dict) and "missing key" not in sentence:
        fields = {"holds": "it", **fields}
    (tmp_path / "train").mkdir()
    path = card_of(tmp_path / "train")
    path.write_text(path.read_text().replace("controls: {}", yaml.safe_dump({"controls": {"act": fields}})))
    with pytest.raises(UserError, match=sentence) as caught:
        load_card(path, require_shards=False)
    assert str(caught.value).startswith("card ") and "\n" not in str(caught.value)


@given(st.data(), st.integers(1, 12))
def test_states_choose_and_value_in_either_order(data: st.DataObject, frames: int) -> None:
    """And reading one control, or more of them at once, gives the same columns."""
    entry = st.none() | st.lists(numbers | st.none(), min_size=2, max_size=2)
    clip = {"a": data.draw(st.lists(entry, min_size=frames, max_size=frames))}
    chosen = sorted(data.draw(st.lists(st.integers(0, frames - 1), min_size=1, max_size=20)))
    every = control_values(clip, {"a": STATE}, range(frames), frames)
    found = control_values(clip, {"a": STATE, "b": PUSH}, chosen, frames)
    assert found.dtype == np.float32 and found.shape == (len(chosen), 3)
    assert np.array_equal(found[:, :2], every[chosen], equal_nan=True) and np.isnan(found[:, 2]).all()


@given(st.data(), st.integers(2, 12))
def test_sums_over_skipped_frames_are_differences_of_a_path(data: st.DataObject, frames: int) -> None:
    steps = data.draw(st.lists(st.integers(-9, 9), min_size=frames, max_size=frames))
    chosen = np.array(sorted(data.draw(st.lists(st.integers(0, frames - 1), min_size=1, max_size=20))))
    path = np.cumsum([0, *steps])
    found = control_values({"d": steps}, {"d": PUSH}, chosen, frames)
    assert np.isnan(found[0]).all() and np.array_equal(found[1:, 0], np.diff(path[chosen]))
    shorter = control_values({"d": steps[:-1]}, {"d": PUSH}, chosen, frames)
    assert np.array_equal(shorter, found, equal_nan=True), "nothing leads out of the clip"


def test_what_a_step_over_several_frames_gets() -> None:
    clip = {"a": [1, 2, 4, None, 16, 32], "k": [[1, 0], [0, 0], [0, 0], [0, 1], [0, 0], [1, 1]]}
    wanted = {"sum": PUSH, "mean": SPEED, "last": TARGET}
    found = control_values(dict.fromkeys(wanted, clip["a"]), wanted, [0, 2, 3, 5], 6)
    assert np.array_equal(found[1:], [[3, 1.5, 2], [4, 4, 4], [np.nan] * 3], equal_nan=True)
    keys = control_values({"k": clip["k"]}, {"k": KEYS}, [0, 2, 3, 5], 6)
    assert np.array_equal(keys, [[np.nan] * 2, [1, 0], [0, 0], [0, 1]], equal_nan=True)


def test_a_frame_that_is_shown_again_moves_nothing_and_keeps_its_keys() -> None:
    wanted = {"sum": PUSH, "mean": SPEED}
    found = control_values(dict.fromkeys(wanted, (5, 7, 9)), wanted, [0, 0, 1, 1, 2, 2], 3)
    assert np.array_equal(found[1:], [[0, 5], [5, 5], [0, 7], [7, 7], [0, 9]])


def test_entries_may_be_nested_or_named() -> None:
    named = Control("both", 2, numbers=("speed", "heading"))
    assert control_rows("a", named, [{"heading": 1, "speed": 2}, None, {"speed": 3}])[[0, 2], 0].tolist() == [2, 3]
    assert control_rows("a", STATE, [{"heading": 1, "speed": 2}]).tolist() == [[1, 2]], "by the alphabet"
    assert control_rows("a", Control("m", 4), [[[1, 2], [3, True]]]).tolist() == [[1, 2, 3, 1]]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"a": [[1, 2, 3]] * 4}, "its a have 3 numbers a frame, not the 2 that the card says"),
        ({"a": [[1, 2]] * 3}, "its a have 3 entries, the clip 4 frames"),
        ({"a": [[1, 2]] * 5}, "its a have 5 entries, the clip 4 frames"),
        ({"a": []}, "its a have 0 entries"),
        ({"a": [[1, 2], [1], [1, 2], [1, 2]]}, "its a have 1 to 2 numbers a frame"),
        ({"a": [["1", "2"]] * 4}, "its a hold '1', which is no number"),
        ({"a": [[1, "x"]] * 4}, "its a hold 'x', which is no number"),
        ({"a": [[1, float("inf")]] * 4}, "not finite, or too large"),
        ({"a": [[1, 10**400]] * 4}, "not finite, or too large"),
        ({"a": 7}, "no list with one entry a frame"),
        ({"a": "text"}, "no list with one entry a frame"),
        ([1], "its controls are malformed"),
    ],
)
def test_what_does_not_fit_is_a_bad_clip(given: Any, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        control_values(given, {"a": STATE}, range(4), 4)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=12,
)


@given(json_values, st.sampled_from([STATE, PUSH, KEYS]))
def test_whatever_a_clip_holds_it_is_values_or_a_bad_clip(values: Any, control: Control) -> None:
    try:
        found = control_values({"a": values}, {"a": control}, range(2), 2)
    except DecodeError as error:
        assert "\n" not in str(error)
    else:
        assert found.shape == (2, control.width) and not np.isinf(found).any()


def test_cards_together(make_shards: MakeShards) -> None:
    parts = {0: clip_parts(0)}
    speed = Control("speed", 1, low=(1.0,), high=(4.0,), unit=("m/s",))
    told: dict[str, dict[str, Any]] = {
        "a": {"speed": speed, "words": "some"},
        "b": {"speed": replace(speed, holds="v", low=(0.0,), high=(3.0,), unit=()), "words": "some"},
        "c": {},
        "d": {"speed": replace(speed, at="transition")},
        "e": {"speed": replace(speed, unit=("km/h",))},
    }
    cards = {name: str(card_of(make_shards(parts, name=f"{name}/train"), controls=own)) for name, own in told.items()}
    yaw = Control("yaw", 1, low=(-3.0,), high=(3.0,))
    angles = [replace(yaw, period=turn) for turn in ((), (6.28319,), (0.0,))]
    folders = {
        n: str(card_of(make_shards(parts, name=f"y{n}/train"), controls={"yaw": a})) for n, a in enumerate(angles)
    }
    assert [wanted_controls([folders[0], folders[n]], ["yaw"])["yaw"].period for n in folders] == [
        (),
        (6.28319,),
        (0.0,),
    ]
    assert wanted_controls(folders.values(), ["yaw"])["yaw"].period == (6.28319,), "a card that saw no jump"
    both = wanted_controls([cards["a"], cards["b"], cards["c"]], ["speed"])
    assert both == {"speed": replace(speed, low=(0.0,), high=(4.0,))}
    for names, of, sentence in [
        (["speed"], "ad", "'speed' has at frame in the card .* and transition in"),
        (["speed"], "ae", "'speed' has unit"),
        (["words"], "ab", "tells of 'words' in words alone: anyflow data controls"),
        (["sped"], "ab", "data.controls: 'sped' is no control of the cards .*: choose of speed, words"),
        (["sped"], "c", "there are none"),
    ]:
        with pytest.raises(UserError, match=sentence):
            wanted_controls([cards[card] for card in of], names, where="data.controls")


def test_controls_of_one_name_are_told_apart_by_their_domain() -> None:
    """The shipped cards of driving and games both have actions, of other meanings: each clip fills its own columns."""
    cards = ["driving-uncaptioned", "games-uncaptioned"]
    with pytest.raises(UserError, match=r"name each by its domain \(DOMAIN.actions\)"):
        wanted_controls(cards, ["actions"])
    names = ["driving.actions", "games.actions"]
    wanted = wanted_controls(cards, names)
    assert [control.numbers for control in wanted.values()] == [("speed", "heading"), ("turn_right", "forward")]
    facts = {name: json.loads(json.dumps(control.to_dict())) for name, control in wanted.items()}
    assert learnt_controls(facts, cards, "heldout") == wanted
    assert wanted_controls(cards[1:], ["games.actions", "actions"])["actions"] == wanted["games.actions"]
    for column, card in enumerate(cards):
        found = find_split(card, "heldout")
        reader, shape = ShardReader([found.folder], [found.caption]), ClipShape(17, 64, 96)
        clips = ClipDataset(reader, Order(reader.identities(), seed=0, global_batch=1), shape, controls=wanted)
        frames = np.empty((17, 64, 96, 3), dtype=np.uint8)
        facts = clips.load(0, 0, reader.shards[0][1].samples[0], frames)
        known = ~np.isnan(facts["control_values"])
        assert known[1:].reshape(16, 2, 2).all((0, 2)).tolist() == [column == 0, column == 1]
        assert known.reshape(17, 2, 2).any((0, 2)).tolist() == [column == 0, column == 1]
    with pytest.raises(UserError, match=r"'robotics\.actions' is no control"):
        wanted_controls(cards, ["robotics.actions"])


def test_a_cards_other_lines_stay_when_its_controls_are_written(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    path = card_of(tmp_path / "train")
    plain = path.read_text()
    for controls_line in ("controls: {}\n", "controls:\n  a: words\n  # of a\n\n# of what follows\n", ""):
        path.write_text("# a comment\n" + plain.replace("controls: {}\n", controls_line))
        write_controls(load_card(path, require_shards=False), {"speed": STATE})
        text = path.read_text()
        assert text.startswith("# a comment\n") and ("# of what follows" in text) == ("follows" in controls_line)
        loaded = load_card(path, require_shards=False)
        assert loaded.controls == {"speed": STATE} and asdict(loaded)["fps"] == 8.0
    path.write_text(plain.replace("controls: {}\n", "controls: {\na: words,\nb: words}\n"))
    with pytest.raises(UserError, match="put in by hand"):
        write_controls(load_card(path, require_shards=False), {"speed": STATE})
