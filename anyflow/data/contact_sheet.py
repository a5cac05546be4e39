"""A contact sheet: clips as strips of frames with their captions, to see at a glance what a data set holds."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np

from anyflow.data.card import DatasetCard, load_card
from anyflow.data.check import shape_of
from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.reader import ShardReader
from anyflow.data.skips import MAX_TRIES, Skip, none_usable
from anyflow.data.tar_index import ready
from anyflow.errors import UserError

FRAMES_SHOWN = 5
MOST_FRAMES = 161
"""Of somebody else's clip, which may be long: its beginning is shown."""
THUMBNAIL_WIDTH = 192
FONT_SIZE, LINE_HEIGHT, MARGIN = 14, 18, 6


def contact_sheet(card: DatasetCard | str | Path, split: str, count: int, path: Path) -> Path:
    """Write a PNG with the first ``count`` clips of a split: five frames from first to last, under the caption.

    Clips that cannot be used are named, and others shown.

    Raises:
        UserError: the card, the split or the count is wrong, or no clip can be used.
    """
    from PIL import Image

    loaded = card if isinstance(card, DatasetCard) else load_card(card)
    if count < 1:
        raise UserError(f"count {count}: give at least 1")
    if split not in loaded.splits:
        raise UserError(f"card {loaded.name!r} has no split {split!r}: choose one of {', '.join(loaded.splits)}")
    folder = loaded.splits[split]
    ready(folder)
    reader = ShardReader([folder], [loaded.stand_in or NO_CAPTION])
    samples = ((number, sample) for number, (_, shard) in enumerate(reader.shards) for sample in shard.samples)
    strips: list[np.ndarray] = []
    bad: list[Skip] = []
    for number, sample in samples:
        try:
            video = reader.video(number, sample)
            frames = decode_clip(video, _small(shape_of(loaded, video)))
            caption = reader.describe(number, sample)["caption"]
            strips.append(_strip(frames, f"{sample.key}: {caption}"))
        except DecodeError as error:
            bad.append(Skip(reader.shards[number][1].name, sample.key, str(error)))
        if len(strips) == count or len(bad) == MAX_TRIES:
            break
    if not strips:
        raise none_usable(bad)
    for skip in bad:
        print(f"not shown: {skip}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(strips)).save(path, "PNG")
    return path


NO_CAPTION = "(no caption)"


def _small(shape: ClipShape) -> ClipShape:
    """The beginning of a clip, no larger than it is shown."""
    scale = min(1.0, 2 * THUMBNAIL_WIDTH / shape.width)
    return ClipShape(min(shape.frames, MOST_FRAMES), round(shape.height * scale), round(shape.width * scale))


def _strip(frames: np.ndarray, text: str) -> np.ndarray:
    """One clip: its caption, and below it some of its frames side by side; uint8 [h, w, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    chosen = frames[np.linspace(0, len(frames) - 1, FRAMES_SHOWN).round().astype(int)]
    _, height, width, _ = chosen.shape
    size = (THUMBNAIL_WIDTH, round(height * THUMBNAIL_WIDTH / width))
    font = ImageFont.load_default(FONT_SIZE)
    strip_width = FRAMES_SHOWN * (THUMBNAIL_WIDTH + MARGIN) + MARGIN
    letters = int((strip_width - 2 * MARGIN) / font.getlength("n"))
    lines = textwrap.wrap(text, letters) or [""]
    top = LINE_HEIGHT * len(lines) + MARGIN
    sheet = Image.new("RGB", (strip_width, top + size[1] + MARGIN), "white")
    ImageDraw.Draw(sheet).multiline_text((MARGIN, 2), "\n".join(lines), fill="black", font=font, spacing=4)
    resampling = Image.Resampling.NEAREST if width < THUMBNAIL_WIDTH else Image.Resampling.BOX
    for i, frame in enumerate(chosen):
        sheet.paste(Image.fromarray(frame).resize(size, resampling), (MARGIN + i * (THUMBNAIL_WIDTH + MARGIN), top))
    return np.asarray(sheet)
