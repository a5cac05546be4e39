"""Two at once, for one place: a sentence, or waiting; what is written is one's own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from footage_files import lenient, put, video
from test_cache import SHAPE, MeanCodec

from anyflow.data.card import check_shards
from anyflow.data.encode import Encoding
from anyflow.data.importing import finish
from anyflow.data.importing.run import import_dataset
from anyflow.errors import UserError
from anyflow.simulators.make import _place_beside
from anyflow.system.locks import claimed


def films(folder: Path, count: int = 6) -> Path:
    for number in range(count):
        put(folder / f"v{number}.mp4", video(number, 24, 8))
    return folder


@pytest.mark.slow
def test_one_import_started_three_times(tmp_path: Path) -> None:
    """Whoever is first makes it; the others say so, or that it is there, and nothing is mixed or left."""
    films(tmp_path / "in")
    words = [sys.executable, "-m", "anyflow", "data", "import", str(tmp_path / "in"), "--to", str(tmp_path / "out")]
    words += ["--frames", "4", "--default-caption", "x", "--heldout", "0.3", "--workers", "0"]
    started = [subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2, 2]
    for process, text in zip(started, told, strict=True):
        assert not process.returncode or "another import is writing" in text or "is in use" in text
    assert check_shards(tmp_path / "out/card.yaml") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_an_import_that_another_one_overtakes_is_refused(tmp_path: Path) -> None:
    films(tmp_path / "in", 2)
    refused = pytest.raises(UserError, match=r"another import is writing '.*out': wait for it")
    with claimed(tmp_path / ".out.import"), refused:
        import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    (tmp_path / ".out.import").mkdir()  # as one leaves it that comes late
    with pytest.raises(UserError, match="is in use"):
        import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_place_that_is_taken_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    films(tmp_path / "in", 2)
    real = finish._write_card

    def slow(*words: object) -> None:
        real(*words)  # type: ignore[arg-type]
        put(tmp_path / "out/mine.txt", "mine")

    monkeypatch.setattr(finish, "_write_card", slow)
    with pytest.raises(UserError, match="was taken by something else meanwhile"):
        import_dataset(tmp_path / "in", tmp_path / "out", lenient())
    assert (tmp_path / "out/mine.txt").read_text() == "mine"
    monkeypatch.setattr(finish, "_write_card", real)
    (tmp_path / "out/mine.txt").unlink()
    assert import_dataset(tmp_path / "in", tmp_path / "out", lenient()).taken == 2


def test_one_data_set_is_rendered_once(tmp_path: Path) -> None:
    (tmp_path / ".set.part/new/half").mkdir(parents=True)  # a killed one's
    with _place_beside(tmp_path / "set") as building:
        assert not building.exists()
        with pytest.raises(UserError, match="another process renders"), _place_beside(tmp_path / "set"):
            pass
        building.mkdir()
        building.rename(tmp_path / "set")
    put(tmp_path / "set/x", "x")
    with pytest.raises(UserError, match="is in use"), _place_beside(tmp_path / "set"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_one_cache_is_encoded_once(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A command says so and leaves; training waits and takes what the other has made."""
    first, second = (Encoding(shards, "train", MeanCodec(), (SHAPE,), tmp_path / "cache") for _ in range(2))
    order: list[str] = []

    def wait() -> None:
        with second.held():
            order.append("second")
            assert second.is_whole()

    with first.held():
        with pytest.raises(UserError, match="is being encoded by another process"), second.held(waits=False):
            pass
        waiting = threading.Thread(target=wait)
        waiting.start()
        while "waiting for it" not in caplog.text:
            time.sleep(0.01)
        first.all()
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]
