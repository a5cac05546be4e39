"""The frames that a play can start from: a picture, held-out clips of a card, or of the model's own cards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anyflow.data.decode import ClipShape
from anyflow.errors import UserError
from anyflow.play.starts import MOST, cards_of, starts_of

SHAPE = ClipShape(17, 64, 96, 8.0)


def export(folder: Path, *cards: str) -> str:
    """What is looked at of an export."""
    folder.mkdir()
    data = "\n".join(f"- **{card}**: MIT. Clips." for card in cards)
    (folder / "README.md").write_text(f"# A model\n\n## Data\n\n{data}\n\n## Limits\n\n- **none**: none\n")
    return str(folder)


def test_each_of_a_models_cards_has_its_share(tmp_path: Path) -> None:
    model = export(tmp_path / "m", "driving-uncaptioned", "not-here", "games-uncaptioned")
    assert cards_of(model) == ["driving-uncaptioned", "not-here", "games-uncaptioned"]
    starts, note = starts_of(model, SHAPE, None, None, None)
    domains = [start.domain for start in starts]
    assert domains == ["driving"] * (MOST // 3) + ["games"] * (MOST - MOST // 3) and not note
    assert {start.caption for start in starts if start.domain == "driving"} == {"Footage of driving."}
    assert all(start.pixels is not None and start.pixels.shape == (1, 1, 64, 96, 3) for start in starts)
    assert np.std([start.pixels.mean() for start in starts if start.pixels is not None]) > 0


def test_a_picture_takes_prompt_and_domain_from_the_card(tmp_path: Path) -> None:
    Image.new("RGB", (300, 100), (200, 10, 10)).save(tmp_path / "start.png")
    model = export(tmp_path / "m", "driving-uncaptioned")
    [own], _ = starts_of(model, SHAPE, tmp_path / "start.png", None, None)
    [other], _ = starts_of(model, SHAPE, tmp_path / "start.png", "games-uncaptioned", None)
    [mine], _ = starts_of(model, SHAPE, tmp_path / "start.png", None, "A hall.")
    assert [own.domain, other.domain, mine.domain] == ["driving", "games", "driving"]
    assert own.caption == "Footage of driving." != other.caption and mine.caption == "A hall."
    assert own.pixels is not None and abs(own.pixels[..., 0].astype(int) - 200).max() < 4


def test_what_is_asked_for_must_be_there_and_what_is_not_is_told(tmp_path: Path) -> None:
    model = export(tmp_path / "m", "not-here")
    [start], note = starts_of(model, SHAPE, None, None, "A road.")
    assert start.pixels is None and start.caption == "A road." and "it is sampled too" in note
    with pytest.raises(UserError, match="not-here"):
        starts_of(model, SHAPE, None, "not-here", None)


def test_the_shipped_world_starts_on_roads_and_in_halls(project: Path) -> None:
    """From clips that ship: of what it was trained on not all does."""
    starts, note = starts_of(str(project / "data/models/tiny-world"), SHAPE, None, None, None)
    assert {start.domain for start in starts} == {"driving", "games"} and not note
