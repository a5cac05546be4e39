"""Cosmos-Predict2 post-training folders: videos/*.mp4 with captions in metas/*.txt. Their pickles are never opened."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from anyflow.data.controls import Control
from anyflow.data.decode import DecodeError
from anyflow.data.importing.recording import Found, Recording, Track, Unusable, VideoFile
from anyflow.data.importing.walk import walk_videos
from anyflow.data.safety import find_pickles, read_text

LOOKS_FOR = "the folders videos and metas"
DOMAIN = "video"
CONTROLS: Mapping[str, Control | str] = {}

log = logging.getLogger(__name__)


def detect(folder: Path) -> bool:
    """Whether the two folders are there, the second with texts."""
    return (folder / "videos").is_dir() and next((folder / "metas").glob("*.txt"), None) is not None


def recordings(folder: Path) -> Iterator[Found]:
    """Every video with its text."""
    pickles = find_pickles(folder)
    if pickles:
        log.warning("%d pickles were not opened, for they can run code (%s, ...)", len(pickles), pickles[0])
    for video in walk_videos(folder / "videos"):
        key = video.relative_to(folder / "videos").with_suffix("").as_posix()
        text = (folder / "metas" / key).with_name(f"{Path(key).name}.txt")
        try:
            caption = read_text(text) if text.is_file() else None
        except DecodeError as error:
            yield Unusable(key, str(error))
            continue
        yield Recording(key, key, VideoFile(str(video)), caption=caption)


def controls(folder: Path, recording: Recording) -> Mapping[str, Track]:
    """None: there are no controls."""
    return {}
