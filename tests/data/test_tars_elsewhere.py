"""Somebody else's tars on a web server and in a bucket: indexed by little, fetched, streamed, replaced."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tar_cards import captions, card_of, module_of, reader_of
from tar_files import sample, write_set, write_tar
from web import serve

from anyflow.data import places, remote
from anyflow.data.card import load_card
from anyflow.data.reader import find_split
from anyflow.data.tars import expand, load_set
from anyflow.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_tars_on_a_web_server_are_indexed_by_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers alone are asked for, through faults; clips then come as from this machine."""
    big = os.urandom(300_000)
    for tar in range(3):
        members = [m for n in range(4) for m in (*sample(f"{n}", n), (f"{n}.bin", big))]
        write_tar(tmp_path / f"web/set/{tar}.tar", members)
    size = sum(path.stat().st_size for path in (tmp_path / "web/set").iterdir())
    with serve(tmp_path / "web") as web:
        web.faults["1.tar"] = ["error", "truncated"]
        card = f"{web.url}/set/{{0..2}}.tar"
        find_split(card, "train"), find_split(card, "heldout")
        spans = [tuple(map(int, span[6:].split("-"))) for _, span in web.asked if span]
        assert sum(end - start + 1 for start, end in spans) < 0.5 * size
        assert len(captions(reader_of(card))) == 8
        found = {
            key: caption for split in ("train", "heldout") for key, caption in captions(reader_of(card, split)).items()
        }
        assert found == captions_of_files(tmp_path / "web/set")
        with pytest.raises(UserError, match=r"there is no .*/set/card\.yaml.*nor are there tars .*pattern such as"):
            load_card(f"{web.url}/set")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_that_a_server_does_not_have_counts_as_one_that_is_not_there(tmp_path: Path, streaming: bool) -> None:
    """As on a disk: the pattern may name too many, within the budget."""
    write_set(tmp_path / "web", [2, 2, 2, 2])
    with serve(tmp_path / "web") as web:
        card = f"{web.url}/{{000..006}}.tar"
        held = load_set(find_split(card, "heldout", index=False).folder)
        assert held is not None and [tar.rpartition("/")[2] for tar in held.tars] == ["003.tar"]
        more: dict[str, Any] = {"streaming": streaming, "steps": 6}
        with pytest.raises(
            UserError, match=r"of 6 tars cannot be read, more than error_budget .*the server answers 404"
        ):
            [*module_of(card, **more).train_dataloader()]
        seen = {key for batch in module_of(card, error_budget=0.9, **more).train_dataloader() for key in batch["key"]}
        assert seen == {f"{tar:03d}/clip{clip}" for tar in range(3) for clip in range(2)}


def captions_of_files(folder: Path) -> dict[str, str]:
    return {f"{path.stem}/{n}": "a caption" for path in folder.iterdir() for n in range(4)}


def test_tars_that_do_not_fit_the_cache_are_read_clip_by_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "web/set", [4])
    size = (tmp_path / "web/set/000.tar").stat().st_size
    for room, copies in ((40 * size, 1), (20 * size, 0)):
        monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / f"cache-{copies}"))
        monkeypatch.setenv(remote.LIMIT_VARIABLE, repr(room / 1e9))
        with serve(tmp_path / "web") as web:
            assert len(captions(reader_of(card_of(tmp_path, [f"{web.url}/set/000.tar"])))) == 4
        assert len(list(tmp_path.glob(f"cache-{copies}/*/*.tar"))) == copies


def test_tars_on_a_web_server_are_streamed(tmp_path: Path) -> None:
    keys = write_set(tmp_path / "web/set", [4, 4])
    with serve(tmp_path / "web") as web:
        web.faults["000.tar"] = ["error", "ok", "truncated"]
        card = card_of(tmp_path, f"{web.url}/set/{{000..001}}.tar")
        data = module_of(card, streaming=True, steps=4)
        assert sorted(key for batch in data.train_dataloader() for key in batch["key"]) == keys
        web.faults["000.tar"] = ["refused"] * 3
        with pytest.raises(UserError, match=r"it is forbidden.*credentials"):
            list(module_of(card, streaming=True, steps=4).train_dataloader())


@pytest.fixture
def bucket(s3: Any, tmp_path: Path) -> Any:
    """A bucket with three tars."""
    write_set(tmp_path / "set", [3, 3, 2])
    for path in (tmp_path / "set").iterdir():
        s3.upload_file(str(path), "footage", f"my/set/{path.name}")
    return s3


def test_tars_in_a_bucket(bucket: Any, tmp_path: Path, again: Any) -> None:
    """By a pattern and by their folder, indexed and streamed; one that is replaced, by as many bytes, is read anew."""
    by_pattern = captions(reader_of("s3://footage/my/set/{000..002}.tar"))
    assert by_pattern == captions(reader_of("s3://footage/my/set")) and len(by_pattern) == 6
    card = card_of(tmp_path, "s3://footage/my/set/{000..002}.tar")
    streamed = module_of(card, streaming=True, steps=4)
    assert len({key for batch in streamed.train_dataloader() for key in batch["key"]}) == 8
    other = write_tar(
        tmp_path / "other.tar", [m for n in range(3) for m in sample(f"clip{n}", n, f"CLIP {n} of tar 0")]
    )
    assert other.stat().st_size == (tmp_path / "set/000.tar").stat().st_size
    bucket.upload_file(str(other), "footage", "my/set/000.tar")
    again()
    assert captions(reader_of(card))["000/clip1"] == "CLIP 1 of tar 0"


@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=8), st.booleans())
def test_a_file_elsewhere_reads_as_one_here(jumps: list[int], ahead: bool) -> None:
    content = np.random.default_rng(0).integers(0, 256, 300_001, dtype=np.uint8).tobytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "BLOCK", 70_000)
        patch.setattr(remote, "read_at", lambda address, start, end: content[start:end])
        with places.RangeFile("s3://x/y", len(content), ahead) as file:
            here = io.BytesIO(content)
            for jump in jumps:
                file.seek(jump), here.seek(jump)
                for count in (1, 513, 100_000):
                    assert file.read(count) == here.read(count)
                    assert file.tell() == here.tell()


def test_expand_is_relative_to_the_card() -> None:
    assert expand("a/{0..1}.tar", "/home/me") == ["/home/me/a/0.tar", "/home/me/a/1.tar"]
    assert expand(["a.tar", "s3://b/c.tar"], "https://host/set") == ["https://host/set/a.tar", "s3://b/c.tar"]
