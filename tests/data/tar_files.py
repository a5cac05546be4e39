"""Tars as other people write them: of tiny clips, with members of any name."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from tiny_shards import clip_parts

Named = Iterable[tuple[str, bytes]]


@cache
def video(number: int) -> bytes:
    """A clip of 5 frames whose brightness is its number's."""
    return clip_parts(number % 20)["mp4"]


def sample(key: str, number: int = 0, caption: str | None = "a caption") -> list[tuple[str, bytes]]:
    """``KEY.mp4`` and ``KEY.txt``."""
    text = [] if caption is None else [(f"{key}.txt", caption.encode())]
    return [(f"{key}.mp4", video(number)), *text]


def write_tar(path: Path, members: Named, form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_set(folder: Path, sizes: Sequence[int]) -> list[str]:
    """Tars of so many clips each; returns every clip's key as batches have it."""
    keys = []
    for tar, size in enumerate(sizes):
        members = []
        for clip in range(size):
            members += sample(f"clip{clip}", tar + clip, f"clip {clip} of tar {tar}")
            keys.append(f"{tar:03d}/clip{clip}")
        write_tar(folder / f"{tar:03d}.tar", members)
    return keys
