"""A contact sheet: clips as strips of frames with their captions, to see at a glance what a data set holds."""

from __future__ import annotations

import textwrap
from itertools import islice
from pathlib import Path

import numpy as np

from anyflow.data.card import DatasetCard, iterate, load_card
from anyflow.data.decode import ClipShape, DecodeError, decode_clip
from anyflow.data.shards import read_clip
from anyflow.errors import UserError

FRAMES_SHOWN = 5
THUMBNAIL_WIDTH = 192
FONT_SIZE, LINE_HEIGHT, MARGIN = 14, 18, 6


def contact_sheet(card: DatasetCard | str | Path, split: str, count: int, path: Path) -> Path:
    """Write a PNG with the first ``count`` clips of a split: five frames from first to last, under the caption.

    Raises:
        UserError: the card, the split or the count is wrong, or a clip cannot be decoded.
    """
    from PIL import Image

    loaded = card if isinstance(card, DatasetCard) else load_card(card)
    if count < 1:
        raise UserError(f"count {count}: give at least 1")
    shape = ClipShape(frames=loaded.frames, height=loaded.height, width=loaded.width)
    strips = []
    for folder, shard, sample in islice(iterate(loaded, split), count):
        clip = read_clip(folder, shard, sample)
        assert clip.mp4 is not None
        try:
            frames = decode_clip(clip.mp4, shape)
        except DecodeError as error:
            raise UserError(f"clip {clip.key!r} in {str(folder / shard.name)!r}: {error}") from error
        strips.append(_strip(frames, f"{clip.key}: {loaded.caption if loaded.replace_captions else clip.caption}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(strips)).save(path, "PNG")
    return path


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
