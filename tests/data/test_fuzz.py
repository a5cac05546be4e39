"""Fuzz: a spoilt file costs clips or is a sentence, never another exception, in every importer and in shards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import drive_files
import pytest
from footage_files import lenient, lerobot_v2, lerobot_v3, put, put_csv, put_tar, video
from robot_files import annotated, as_images, two_arms
from tiny_shards import FRAMES, HEIGHT, WIDTH, card_of

from anyflow.data.batches import ClipDataset
from anyflow.data.check import check_card
from anyflow.data.decode import ClipShape
from anyflow.data.importing.formats.known import FORMATS
from anyflow.data.importing.run import import_dataset
from anyflow.data.order import Order
from anyflow.data.reader import ShardReader
from anyflow.errors import UserError


def spoil(data: bytes, dice: random.Random) -> bytes:
    """Change some bytes, cut, repeat, or put in something that parsers trip over."""
    kind = dice.randrange(6)
    place = dice.randrange(len(data) + 1)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + dice.randbytes(dice.randrange(1, 40)) + data[place:]
    if kind == 2:
        changed = bytearray(data)
        for _ in range(dice.randrange(1, 30)):
            if changed:
                changed[dice.randrange(len(changed))] = dice.randrange(256)
        return bytes(changed)
    if kind == 3:
        return data[:place] + data[dice.randrange(len(data) + 1) :]
    tokens = [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b'""',
        b"{}",
        b"[]",
        b"9" * 5000,
        b"[" * 3000,
        b'"\\ud800"',
        b"\xff\xfe",
        b"true",
    ]
    digits = [i for i, byte in enumerate(data) if byte in b"0123456789"] or [0]
    at = dice.choice(digits)
    return data[:at] + dice.choice(tokens) + data[at + 1 :]


def webdataset(folder: Path) -> Path:
    members = [
        (f"s{n}.{part}", data) for n in range(2) for part, data in (("mp4", video(n, 8, 8)), ("json", b'{"a": 1}'))
    ]
    put_tar(folder / "0.tar", members)
    return folder


def table(folder: Path) -> Path:
    for number in range(2):
        put(folder / f"v{number}.mp4", video(number, 8, 8))
    put_csv(folder / "metadata.csv", [{"file_name": f"v{n}.mp4", "text": f"Video {n}"} for n in range(2)])
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "lerobot": lambda folder: lerobot_v3(folder, 2, 8),
    "lerobot-v2": lambda folder: lerobot_v2(folder, 2, 8),
    "lerobot-images": lambda folder: as_images(folder, episodes=2, frames=8),
    "irasim": lambda folder: annotated(folder, frames=8),
    "irasim-arms": lambda folder: annotated(folder, two_arms, frames=8),
    "nuscenes": lambda folder: drive_files.nuscenes(folder, 1, 0.7),
    "comma2k19": lambda folder: drive_files.comma2k19(folder, 1, 2, 8),
    "bdd100k": lambda folder: drive_files.bdd100k(folder, 2, 8),
    "vpt": lambda folder: drive_files.vpt(folder, 2, 8),
    "gf-minecraft": lambda folder: drive_files.gf_minecraft(folder, 1, 16),
    "cosmos": lambda folder: drive_files.cosmos(folder, 2, 8),
    "webdataset": webdataset,
    "folder": table,
}


def fuzz_importer(name: str, seeds: range, tmp_path: Path) -> None:
    """A spoilt file costs clips, or is a sentence: never another exception, a hang or a file elsewhere."""
    folder = WRITERS[name](tmp_path / "in")
    format = name if name in FORMATS else name.partition("-")[0]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for seed in seeds:
        dice = random.Random(f"{name}/{seed}")
        path = dice.choice(files)
        whole = path.read_bytes()
        path.write_bytes(spoil(whole, dice))
        try:
            report = import_dataset(folder, tmp_path / f"out{seed}", lenient(format=format, scene_cuts=0.0))
            assert report.clips["train"] > 0
        except UserError as error:
            assert str(error)
        finally:
            path.write_bytes(whole)
    known = {"in", *(f"out{seed}" for seed in seeds), *(f".out{seed}.import" for seed in seeds)}
    assert {path.name for path in tmp_path.iterdir()} <= known


@pytest.mark.parametrize("name", WRITERS)
def test_spoilt_sources(name: str, tmp_path: Path) -> None:
    fuzz_importer(name, range(6), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_spoilt_sources_at_length(name: str, tmp_path: Path) -> None:
    fuzz_importer(name, range(6, 50), tmp_path)


def fuzz_shards(folder: Path, seeds: range) -> None:
    """Every batch of spoilt shards is a batch or a sentence; the check ends, too."""
    card = card_of(folder)
    files = sorted(folder.iterdir())
    for seed in seeds:
        dice = random.Random(seed)
        path = dice.choice(files)
        whole = path.read_bytes()
        path.write_bytes(spoil(whole, dice))
        try:
            reader = ShardReader([folder])
            dataset = ClipDataset(reader, Order(reader.identities(), 0, 4), ClipShape(FRAMES, HEIGHT, WIDTH))
            for index in range(5):
                batch = dataset[index]
                assert "error" in batch or len(batch["caption"]) == 4
        except UserError as error:
            assert str(error)
        finally:
            assert all(isinstance(problem, str) for problem in check_card(card, decode=False))
            path.write_bytes(whole)


def test_spoilt_shards(shards: Path) -> None:
    fuzz_shards(shards, range(40))


@pytest.mark.slow
def test_spoilt_shards_at_length(shards: Path) -> None:
    fuzz_shards(shards, range(40, 300))
