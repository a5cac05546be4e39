"""Cards: the shipped ones hold what they say, and a mistake in one is named with its remedy."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from anyflow.cli.data import app as data
from anyflow.data.card import check_shards, load_card, write_card
from anyflow.data.clip import Clip, encode_mp4
from anyflow.data.contact_sheet import contact_sheet
from anyflow.data.describe import describe_card
from anyflow.data.shards import load_index, read_clip, write_shards
from anyflow.errors import UserError
from anyflow.simulators import make
from anyflow.simulators.options import RenderOptions

DATA = Path(__file__).resolve().parents[2] / "data"
DOMAINS = ("driving", "games", "robotics")


@cache
def footage() -> bytes:
    """A red square that moves to the right over grey: 17 frames of 96x64."""
    frames = np.full((17, 64, 96, 3), 100, dtype=np.uint8)
    for i in range(17):
        frames[i, 24:40, 8 + 2 * i : 24 + 2 * i] = (200, 40, 40)
    return encode_mp4(frames, 8.0)


def sample_clip(number: int, split: str = "train") -> Clip:
    return Clip(
        key=f"toy-{split}-{number}",
        caption=f"A red square moves right over a grey plane, number {number}.",
        fps=8.0,
        domain="toy",
        mp4=footage(),
        attributes={"motion": "right", "number": number},
        licence="MIT",
    )


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "name": "toy",
        "domain": "toy",
        "description": "A square.",
        "splits": {"train": "s/train", "heldout": "s/heldout"},
        "frames": 17,
        "height": 64,
        "width": 96,
        "fps": 8,
        "licence": "MIT",
    }


@pytest.fixture
def card(tmp_path: Path, document: dict[str, Any]) -> Path:
    write_shards([sample_clip(n) for n in range(3)], tmp_path / "s" / "train", "toy")
    write_shards([sample_clip(9, "heldout")], tmp_path / "s" / "heldout", "toy")
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def change(card: Path, **values: Any) -> Path:
    document = yaml.safe_load(card.read_text())
    document.update(values)
    card.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not ...}, sort_keys=False))
    return card


def test_one_caption_for_all_clips(card: Path) -> None:
    from anyflow.data.cache import source_digest
    from anyflow.data.reader import ShardReader, find_split
    from anyflow.tracking.fingerprints import data_fingerprint

    def seen() -> tuple[str, str, str]:
        split = find_split(card, "train")
        reader = ShardReader([split.folder], [split.caption])
        _, shard = reader.shards[0]
        caption = reader.describe(0, shard.samples[1])["caption"]
        assert type(caption) is str  # what goes into files must be readable without this class
        return caption, data_fingerprint(str(card), "train"), source_digest(reader, split.caption)

    own, *_ = seen()
    change(card, caption="A toy.")
    filled = seen()
    change(card, caption="A toy.", replace_captions=True)
    replaced = seen()
    assert own == filled[0] == sample_clip(1).caption and replaced[0] == "A toy."
    assert filled[1] != replaced[1] and filled[2] != replaced[2]  # other captions are other data
    assert describe_card(card)["splits"]["train"]["captions"]["distinct"] == 1
    with pytest.raises(UserError, match="replace_captions is true, but there is no caption"):
        load_card(change(card, caption=None, replace_captions=True))


@pytest.mark.parametrize("domain", DOMAINS)
def test_uncaptioned_cards_are_the_shipped_ones_but_for_the_captions(domain: str) -> None:
    plain, uncaptioned = (
        yaml.safe_load((DATA / f"{name}.yaml").read_text()) for name in (domain, f"{domain}-uncaptioned")
    )
    assert uncaptioned.pop("replace_captions") is True and uncaptioned["caption"]
    assert {**uncaptioned, "name": domain, "caption": None} == plain


def test_a_card_is_read(card: Path) -> None:
    loaded = load_card(card)
    assert (loaded.name, loaded.fps, loaded.caption) == ("toy", 8, None)
    assert loaded.splits["train"] == card.parent / "s" / "train"
    assert check_shards(loaded) == []


def test_a_written_card_reads_back(card: Path, tmp_path: Path) -> None:
    loaded = load_card(card)
    (tmp_path / "else" / "where").mkdir(parents=True)
    write_card(loaded, tmp_path / "else" / "where" / "card.yaml")
    again = load_card(tmp_path / "else" / "where")
    assert again.splits["heldout"].resolve() == loaded.splits["heldout"].resolve()
    assert (again.name, again.licence) == (loaded.name, loaded.licence)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"licnece": "MIT"}, "unknown key 'licnece': did you mean 'licence'"),
        ({"colour": 1}, "unknown key 'colour': known keys: name"),
        ({"path": "x"}, "unknown key 'path'"),
        ({"fps": ...}, "missing key 'fps'"),
        ({"fps": "eight"}, "fps='eight' is not of the right type: give a number"),
        ({"fps": 0}, "fps=0 must be more than 0"),
        ({"frames": 17.5}, "frames=17.5 is not of the right type: give a whole number"),
        ({"frames": True}, "frames=True is not of the right type: give a whole number"),
        ({"splits": ["a"]}, "splits=.*give keys, each with a folder's path"),
        ({"splits": {}}, "splits is empty"),
        ({"caption": 3}, "caption=3 is not of the right type: give a text or null in quotes: '3'"),
        ({"splits": {"train": "nowhere"}}, "splits.train names .*nowhere.*no shards"),
    ],
)
def test_a_mistake_is_named(card: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_card(change(card, **values))


def test_a_card_without_its_shards_can_still_be_read(card: Path) -> None:
    assert load_card(change(card, splits={"train": "nowhere"}), require_shards=False).name == "toy"


@pytest.mark.parametrize("text", ["a: [", "just words", ""])
def test_text_that_is_no_card(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"card .*x\.yaml"):
        load_card(tmp_path / "x.yaml")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_card_that_is_not_utf_8_says_so(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "card.yaml").write_bytes("name: café".encode(encoding))
    with pytest.raises(UserError, match=r"card\.yaml' is not UTF-8 .*: save it as UTF-8$"):
        load_card(tmp_path / "card.yaml")


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean driving"):
        load_card("drivign")


def test_check_finds_a_clip_in_two_splits(card: Path) -> None:
    problems = check_shards(change(card, splits={"train": "s/train", "heldout": "s/train"}))
    assert len(problems) == 3
    assert "'toy-train-0' is in train as well" in problems[0]


def test_check_names_the_damaged_split(card: Path) -> None:
    path = card.parent / "s" / "heldout" / "toy-000000.tar"
    path.write_bytes(path.read_bytes()[:-512])
    assert [problem.startswith("heldout: ") and "truncated" in problem for problem in check_shards(card)] == [True]


def test_description_counts(card: Path) -> None:
    described = describe_card(card)
    train = described["splits"]["train"]
    assert (train["clips"], train["shards"]) == (3, 1)
    assert train["hours"] == pytest.approx(3 * 17 / 8 / 3600, abs=1e-4)
    assert train["captions"]["distinct"] == 3
    assert train["captions"]["mean_words"] == 11
    assert train["captions"]["top_words"]["square"] == 3
    assert train["attributes"]["motion"] == {"right": 3}
    assert described["splits"]["heldout"]["clips"] == 1


def test_contact_sheet_is_a_picture(card: Path, tmp_path: Path) -> None:
    from PIL import Image

    path = contact_sheet(card, "train", 2, tmp_path / "out" / "sheet.png")
    with Image.open(path) as image:
        assert image.width > 5 * 192
        assert image.height > 2 * 128
        assert len(image.getcolors(1 << 20)) > 10


def test_contact_sheet_of_no_such_split(card: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no split 'test': choose one of train, heldout"):
        contact_sheet(card, "test", 2, tmp_path / "sheet.png")


@pytest.mark.parametrize("domain", DOMAINS)
def test_shipped_data(domain: str) -> None:
    """The starter's shards match their index; captions, labels and paths are there for every clip."""
    loaded = load_card(DATA / f"{domain}.yaml")
    assert check_shards(loaded) == []
    counts = {split: load_index(folder).count for split, folder in loaded.splits.items()}
    assert counts["train"] >= 128
    assert counts["heldout"] >= 32
    for folder in loaded.splits.values():
        for shard, sample in load_index(folder):
            clip = read_clip(folder, shard, sample)
            assert 5 < len(clip.caption.split()) < 40
            assert (clip.domain, clip.fps) == (domain, loaded.fps)
            assert set(clip.attributes) == set(loaded.attributes)
            assert set(clip.controls) == set(loaded.controls) == {"actions", "trajectory"}
            assert {len(control) for control in clip.controls.values()} == {loaded.frames}
            for label, value in clip.attributes.items():
                assert not isinstance(loaded.attributes[label], list) or value in loaded.attributes[label]


def test_shipped_data_is_small() -> None:
    assert sum(path.stat().st_size for path in (DATA / "starter").rglob("*") if path.is_file()) <= 20e6


@pytest.mark.parametrize("domain", DOMAINS)
def test_cards_of_whole_sets_say_how_to_render(domain: str) -> None:
    loaded = load_card(DATA / f"{domain}-full.yaml", require_shards=False)
    assert loaded.provenance["command"].startswith(f"anyflow data make {domain} ")
    assert {folder.relative_to(DATA).as_posix() for folder in loaded.splits.values()} == {
        f"shards/{domain}/train",
        f"shards/{domain}/heldout",
    }


class ToySource:
    """Stands for a simulator."""

    DESCRIPTION, LICENCE, FPS, PACKAGES = "A square.", "MIT", 8.0, ("numpy",)
    LOOKS: ClassVar[dict[str, str]] = {"plain": "grey", "painted": "red"}
    CONTROLS: ClassVar[dict[str, str]] = {}
    ATTRIBUTES: ClassVar[dict[str, Any]] = {"motion": ["right"], "number": "which"}

    def __init__(self, breaks: bool = False) -> None:
        self.breaks = breaks

    def render(self, count: int, split: str, seed: int, workers: int, look: str | None) -> Any:
        for number in range(count):
            yield sample_clip(number, split)
        if self.breaks and split == "heldout":
            raise UserError("the simulator died")


def test_make_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "simulator", lambda domain: ToySource())
    seen: list[tuple[int, int, str]] = []
    path = make.make_dataset("toy", RenderOptions(3, 2), tmp_path / "new" / "set", lambda *done: seen.append(done))
    loaded = load_card(path)
    assert path == tmp_path / "new" / "set" / "card.yaml"
    assert {split: load_index(folder).count for split, folder in loaded.splits.items()} == {"train": 3, "heldout": 2}
    assert check_shards(loaded) == []
    assert seen == [(1, 3, "train"), (2, 3, "train"), (3, 3, "train"), (1, 2, "heldout"), (2, 2, "heldout")]
    assert loaded.provenance["command"] == "anyflow data make toy --clips 3 --heldout 2 --seed 0"
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["set"]


def test_make_in_another_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "simulator", lambda domain: ToySource())
    path = make.make_dataset("toy", RenderOptions(1, 1, look="painted"), tmp_path / "set")
    assert load_card(path).provenance["command"].endswith("--seed 0 --look painted")
    with pytest.raises(UserError, match="look 'striped' is not one of toy's: choose one of plain, painted"):
        make.make_dataset("toy", RenderOptions(1, 1, look="striped"), tmp_path / "other")


def test_make_refuses_a_used_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "simulator", lambda domain: ToySource())
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is in use"):
        make.make_dataset("toy", RenderOptions(1, 1), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_make_leaves_nothing_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "simulator", lambda domain: ToySource(breaks=True))
    with pytest.raises(UserError, match="died"):
        make.make_dataset("toy", RenderOptions(1, 1), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("field", "value"), [("clips", 0), ("heldout", -1), ("workers", 0), ("seed", -1)])
def test_make_refuses_numbers(tmp_path: Path, field: str, value: int) -> None:
    done = CliRunner().invoke(data, ["make", "driving", f"--{field}", str(value), "--out", str(tmp_path / "set")])
    assert done.exit_code == 2 and f"--{field}" in done.output and not (tmp_path / "set").exists()


def test_make_of_an_unknown_domain(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="'cooking' has no simulator: choose one of driving, driving-open, robotics, games"
    ):
        make.make_dataset("cooking", RenderOptions(1, 1), tmp_path / "set")
