"""Pictures of samples that a newcomer understands at a glance: a grid as PNG, and the same grid moving as mp4.

Rows are prompts, columns are step counts, the real held-out clip stands in front; with two models, each prompt has a
row of samples for each, one above the other. In the still picture a cell shows the clip's last frame with the path that
the motion probe read from its pixels, and a mark: is it the motion that the prompt asked for?

Clips are uint8 ``[n, F, H, W, 3]``, one for each prompt. Pillow and PyAV are imported inside the functions.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anyflow.evaluation.report.mp4 import Mp4
from anyflow.simulators.motion import PROBES, Reading, asked_motion, read_motion

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Clips = NDArray[np.uint8]

CELL_WIDTH = 192
GAP = 8
MARGIN = 20
CAPTION_WIDTH = 230
LABEL_WIDTH = 74
LABEL_LETTER = 11
"""Pixels of a letter of a label, the widest ones apart."""
HEADER_HEIGHT = 34
NOTE_HEIGHT = 20
TITLE_HEIGHT = 76
MIN_TITLED_WIDTH = 980
"""A title and its legend need this much, however few the columns."""

PAPER = (255, 255, 255)
INK = (28, 32, 38)
FAINT = (120, 126, 134)
RULE = (222, 225, 229)
RIGHT, WRONG = (22, 140, 70), (200, 45, 40)
GIVEN = (235, 130, 20)
VARIANT_COLOURS = (
    *((176, 112, 16), (24, 90, 190), (120, 60, 160), (22, 128, 74)),
    *((200, 50, 45), (42, 140, 154), (107, 107, 107), (208, 89, 154)),
)
"""Of the variants in turn, in pictures and plots alike."""


@dataclass(frozen=True)
class Prompt:
    """One row's request.

    Attributes:
        caption: the text, wrapped in the picture.
        domain: whose motion probe reads the samples; empty or unknown: none does.
        attributes: of the clip; the motion asked for is read from here for the mark. If they name none, the prompt
            leaves the motion open, and nothing is read.
    """

    caption: str
    domain: str = ""
    attributes: Mapping[str, Any] | None = None

    @property
    def asked(self) -> str | None:
        """The motion that the prompt asks for, where it is known."""
        return asked_motion(self.domain, self.attributes) if self.attributes is not None else None

    @property
    def is_read(self) -> bool:
        """Whether the motion of its samples is read and drawn."""
        return self.domain in PROBES and (self.attributes is None or self.asked is not None)


@dataclass(frozen=True)
class Grid:
    """The content of a picture.

    Attributes:
        prompts: one a row.
        variants: ``{"before": {1: clips, 4: clips}, "after": {...}}``; each model's samples by step count.
        real: the prompts' held-out clips, shown as the first column; ``None`` to leave it out.
        title: one line above the grid.
        headings: of the columns; by default the step counts.
        given: frames at the clips' start that were given, not sampled; they are framed.
        notes: what stands above each variant's samples of a step count: a figure of all that were measured.
        notes_say: what these figures are, for the legend.
    """

    prompts: Sequence[Prompt]
    variants: Mapping[str, Mapping[int, Clips]]
    real: Clips | None = None
    title: str = ""
    headings: Mapping[int, str] | None = None
    given: int = 0
    notes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    notes_say: str = ""

    def __post_init__(self) -> None:
        for clips in self._all():
            if clips.ndim != 5 or clips.shape[0] != len(self.prompts):
                raise ValueError(f"{len(self.prompts)} prompts need as many clips [n, F, H, W, 3], got {clips.shape}")

    def _all(self) -> list[Clips]:
        found = [clips for samples in self.variants.values() for clips in samples.values()]
        return found + ([self.real] if self.real is not None else [])

    def heading(self, column: int) -> str:
        """What stands above a column."""
        return self.headings[column] if self.headings is not None else count_steps(column)

    @property
    def steps(self) -> list[int]:
        """All step counts that any variant has, ascending."""
        return sorted({count for samples in self.variants.values() for count in samples})

    @property
    def num_frames(self) -> int:
        """Frames of the longest clip."""
        return max(clips.shape[1] for clips in self._all())


@dataclass(frozen=True)
class _Cell:
    clip: Clips
    box: tuple[int, int, int, int]
    prompt: Prompt
    is_real: bool = False


class _Layout:
    """Where everything stands; the sizes come out even, as h264 with yuv420p needs."""

    def __init__(self, grid: Grid) -> None:
        height, width = grid._all()[0].shape[2:4]
        self.cell = (CELL_WIDTH, round(CELL_WIDTH * height / width))
        self.grid = grid
        longest = max(map(len, map(str, grid.variants)), default=0)
        widest = max(LABEL_WIDTH, LABEL_LETTER * longest)
        self.labels = widest if len(grid.variants) > 1 or grid.headings is not None else 0
        self.columns = len(grid.steps) + (grid.real is not None)
        self.caption_x = MARGIN
        self.real_x = MARGIN + CAPTION_WIDTH + GAP
        self.steps_x = self.real_x + (CELL_WIDTH + 3 * GAP if grid.real is not None else 0) + self.labels
        self.note = NOTE_HEIGHT if grid.notes else 0
        self.pitch = self.note + self.cell[1] + GAP
        self.block = len(grid.variants) * self.pitch + 2 * GAP
        self.top = MARGIN + (TITLE_HEIGHT if grid.title else 0) + HEADER_HEIGHT
        right = self.steps_x + len(grid.steps) * (CELL_WIDTH + GAP) - GAP + MARGIN
        right = max(right, MIN_TITLED_WIDTH if grid.title else 0)
        self.size = (_even(right), _even(self.top + len(grid.prompts) * self.block + MARGIN))

    def cells(self) -> Iterator[_Cell]:
        for index, prompt in enumerate(self.grid.prompts):
            y = self.top + index * self.block + self.note
            if self.grid.real is not None:
                # Centred beside the variants' rows: it belongs to all of them.
                centre = y + ((len(self.grid.variants) - 1) * self.pitch) // 2
                yield _Cell(self.grid.real[index], (self.real_x, centre, *self.cell), prompt, is_real=True)
            for row, samples in enumerate(self.grid.variants.values()):
                for column, count in enumerate(self.grid.steps):
                    if count in samples:
                        x = self.steps_x + column * (CELL_WIDTH + GAP)
                        yield _Cell(samples[count][index], (x, y + row * self.pitch, *self.cell), prompt)


def strips(
    prompts: Sequence[Prompt], samples: Mapping[int, Clips], *, moments: int = 5, fps: float = 8.0, given: int = 0
) -> Grid:
    """Lay samples out in time for a still picture: a row for each step count, a column for each moment.

    Args:
        prompts: one a block of rows.
        samples: ``{step count: clips}``.
        moments: how many frames of each clip, evenly spread from the first to the last.
        fps: of the clips; the headings are seconds.
        given: frames at the start that were given; their headings say so.
    """
    length = min(clips.shape[1] for clips in samples.values())
    times = sorted({round(index * (length - 1) / max(1, moments - 1)) for index in range(moments)})
    return Grid(
        # A single frame has no motion to be judged.
        prompts=[Prompt(prompt.caption) for prompt in prompts],
        variants={
            count_steps(count): {time: clips[:, time : time + 1] for time in times} for count, clips in samples.items()
        },
        headings={time: f"{time / fps:.1f} s" + ", given" * (time < given) for time in times},
    )


def count_steps(count: int) -> str:
    """Write a number of steps: ``1 step``, ``4 steps``."""
    return f"{count} step{'s' * (count > 1)}"


def still(grid: Grid) -> Image:
    """Draw the grid as one picture: last frames, the paths read from the clips, and right-or-wrong marks."""
    layout = _Layout(grid)
    page, pen = _background(layout)
    for cell in layout.cells():
        x, y, width, height = cell.box
        page.paste(_scaled(cell.clip[-1], (width, height)), (x, y))
        reading = read_motion(cell.clip, cell.prompt.domain) if cell.prompt.is_read else None
        if reading is not None:
            _draw_path(pen, reading, cell)
            _draw_mark(pen, reading, cell)
        if grid.given and cell.is_real:
            small = (x, y + height - height // 3, width // 3, height // 3)
            page.paste(_scaled(cell.clip[grid.given - 1], small[2:]), small[:2])
            _draw_given(pen, small)
    return page


def moving(grid: Grid) -> Iterator[NDArray[np.uint8]]:
    """Yield the grid's frames, uint8 ``[height, width, 3]`` with even sizes; a shorter clip stays on its last frame."""
    layout = _Layout(grid)
    page, pen = _background(layout)
    for time in range(grid.num_frames):
        for cell in layout.cells():
            frame = cell.clip[min(time, len(cell.clip) - 1)]
            page.paste(_scaled(frame, cell.box[2:]), cell.box[:2])
            if time < grid.given:
                _draw_given(pen, cell.box)
        yield np.asarray(page)


def save_png(grid: Grid, path: Path) -> None:
    """Write the still picture."""
    still(grid).save(path, optimize=True)


def save_mp4(grid: Grid, path: Path, *, fps: float = 8.0, loops: int = 3, hold: int = 4, quality: int = 18) -> None:
    """Write the moving grid as h264 (yuv420p, so that every browser plays it).

    Args:
        grid: the content.
        path: of the mp4.
        fps: of the clips.
        loops: how many times it plays.
        hold: frames for which the end of each loop stands still.
        quality: h264's constant rate factor: 18 looks like the original, each 6 more halve the bytes.
    """
    frames = list(moving(grid))
    frames += [frames[-1]] * hold
    write_mp4(path, frames * loops, fps, quality)


def write_mp4(path: Path, frames: Sequence[NDArray[np.uint8]], fps: float, quality: int = 18) -> None:
    """Encode uint8 RGB frames ``[H, W, 3]`` of even sizes as h264, yuv420p, playable while it loads."""
    with Mp4(path, fps, quality) as film:
        for frame in frames:
            film.add(frame)


def _background(layout: _Layout) -> tuple[Image, ImageDraw]:
    """Draw everything but the cells: title, headers, captions, labels, rules."""
    from PIL import Image as images
    from PIL import ImageDraw as drawing

    grid = layout.grid
    page = images.new("RGB", layout.size, PAPER)
    pen = drawing.Draw(page)
    if grid.title:
        pen.text((MARGIN, MARGIN), grid.title, INK, _font(22, bold=True))
        pen.multiline_text((MARGIN, MARGIN + 30), "\n".join(_legend(grid)), FAINT, _font(14), spacing=4)
    header_y = layout.top - HEADER_HEIGHT / 2
    pen.text((MARGIN, header_y), "prompt", FAINT, _font(15), anchor="lm")
    if grid.real is not None:
        pen.text((layout.real_x + CELL_WIDTH / 2, header_y), "real clip", INK, _font(16, bold=True), anchor="mm")
    for column, count in enumerate(grid.steps):
        x = layout.steps_x + column * (CELL_WIDTH + GAP) + CELL_WIDTH / 2
        pen.text((x, header_y), grid.heading(count), INK, _font(16, bold=True), anchor="mm")
    for index, prompt in enumerate(grid.prompts):
        y = layout.top + index * layout.block
        if index:
            pen.line([(MARGIN, y - 1.5 * GAP), (layout.size[0] - MARGIN, y - 1.5 * GAP)], RULE)
        lines = len(grid.variants) * layout.pitch // 21
        wrapped = textwrap.wrap(prompt.caption, 28, max_lines=max(2, lines), placeholder=" …")
        pen.multiline_text((layout.caption_x, y), "\n".join(wrapped), INK, _font(15), spacing=5)
        for row, name in enumerate(grid.variants if layout.labels else ()):
            middle = y + row * layout.pitch + layout.note + layout.cell[1] / 2
            colour = VARIANT_COLOURS[row % len(VARIANT_COLOURS)]
            pen.text((layout.steps_x - GAP, middle), name, colour, _font(16, bold=True), anchor="rm")
        for row, name in enumerate(grid.variants):
            for column, count in enumerate(grid.steps):
                x = layout.steps_x + column * (CELL_WIDTH + GAP) + CELL_WIDTH / 2
                note = grid.notes.get(name, {}).get(count, "")
                pen.text((x, y + row * layout.pitch + layout.note / 2), note, INK, _font(15), anchor="mm")
    return page, pen


def _legend(grid: Grid) -> list[str]:
    """Return one or two lines that say how to read the picture."""
    lines = ["Each row: the same prompt and the same noise at every step count."]
    if any(prompt.is_read for prompt in grid.prompts):
        lines.append("Line: the motion read from the pixels; ✓ it is what the prompt asks for, ✗ it is not.")
    if any(prompt.domain == "driving" and prompt.is_read for prompt in grid.prompts):
        lines[-1] += " (Seen from above, driving to the right: left is up.)"
    if grid.notes_say:
        lines.append(f"Above each sample: {grid.notes_say}")
    if grid.given:
        lines[0] += " Framed: what was given of the real clip."
    return lines


def _draw_path(pen: ImageDraw, reading: Reading, cell: _Cell) -> None:
    """Draw the path over the cell as a dark-rimmed line with a dot at its end."""
    x, y, width, height = cell.box
    scale = np.array([width / cell.clip.shape[2], height / cell.clip.shape[1]])
    seen = reading.path[~np.isnan(reading.path).any(1)]
    inside = np.clip((seen + 0.5) * scale, 1, [width - 2, height - 2])
    points = [(x + float(dx), y + float(dy)) for dx, dy in inside]
    if not points:
        return
    for colour, thickness in (((0, 0, 0), 5), ((255, 255, 255), 2)):
        if len(points) > 1:
            pen.line(points, colour, thickness, joint="curve")
        reach = thickness / 2 + 2
        end = points[-1]
        pen.ellipse([end[0] - reach, end[1] - reach, end[0] + reach, end[1] + reach], colour)


def _draw_mark(pen: ImageDraw, reading: Reading, cell: _Cell) -> None:
    """Write what was read in the cell's corner; green and ticked if it was asked for."""
    asked = cell.prompt.asked
    text, colour = reading.label or "nothing found", INK
    if asked is not None:
        text, colour = (f"✓ {text}", RIGHT) if reading.label == asked else (f"✗ {text}", WRONG)
    font = _font(13, bold=True)
    left, _, right, _ = pen.textbbox((0, 0), text, font)
    x, y, width, _ = cell.box
    box = (x + width - (right - left) - 12, y + 3, x + width - 3, y + 21)
    pen.rounded_rectangle(box, 4, colour)
    pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, PAPER, font, anchor="mm")


def _draw_given(pen: ImageDraw, box: tuple[int, int, int, int]) -> None:
    """Frame a picture that was given."""
    x, y, width, height = box
    pen.rectangle((x, y, x + width - 1, y + height - 1), outline=GIVEN, width=3)


def _scaled(frame: Clips, size: Sequence[int]) -> Image:
    from PIL import Image as images

    image = images.fromarray(np.ascontiguousarray(frame))
    return image.resize((size[0], size[1]), images.Resampling.LANCZOS)


@lru_cache
def _font(size: int, bold: bool = False) -> FreeTypeFont:
    """Load DejaVu Sans, which matplotlib ships: no system font is needed."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _even(number: int) -> int:
    return number + number % 2
