"""The arms' samples side by side, for a report: a picture of last frames, and a film."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anyflow.evaluation.curve import CurveResult
from anyflow.evaluation.figures import LOWER
from anyflow.evaluation.heldout import load_curve
from anyflow.evaluation.report.folder import sample_grid
from anyflow.evaluation.report.picture import Grid, save_mp4, save_png
from anyflow.experiment.measured import Measured, short
from anyflow.experiment.pieces import Piece, curve_folder

CELLS = 8
"""Rows of samples in a picture, at most (prompts x arms, but one prompt at least)."""
COLUMNS = 5
"""Step counts of a picture, at most: the fewest, and the most."""
FILM_QUALITIES = (23, 28, 33, 38, 43)
FILMS_BYTES = 1_300_000
"""Of the films of all data sets together: a page that holds them opens at once, and a repository can keep them."""


@dataclass(frozen=True)
class Samples:
    """A data set's samples.

    Attributes:
        card: its name.
        arms: those whose samples the picture shows.
        picture: the file, ``samples-CARD.png``.
        film: the file, ``samples-CARD.mp4``; None: there is none.
    """

    card: str
    arms: list[str]
    picture: Path
    film: Path | None


def draw_samples(measured: Measured, pieces: Sequence[Piece], folder: Path, earlier: Path) -> list[Samples]:
    """Leave picture and film of each data set's samples in the folder of a new report.

    Samples are not kept with the figures: an earlier report's picture and film stay where they show arms that are not
    here, unless the experiment has them no longer.

    Args:
        measured: what the report is about.
        pieces: all of the experiment's pieces.
        folder: of the new report.
        earlier: of the report that it will replace.
    """
    grids, before, found = sample_grids(measured, pieces), _shown(earlier), []
    for card in measured.cards():
        arms, grid = grids.get(card, ([], None))
        was, name = before.get(short(card), []), f"samples-{short(card)}"
        picture, moving = folder / f"{name}.png", folder / f"{name}.mp4"
        if set(arms) < set(was) <= set(measured.experiment.shown) and (earlier / picture.name).is_file():
            for path in (picture, moving):
                if (earlier / path.name).is_file():
                    path.write_bytes((earlier / path.name).read_bytes())
            arms = was
        elif grid is not None:
            save_png(grid, picture)
            save_film(grid, moving, FILMS_BYTES // len(measured.cards()))
        else:
            continue
        found.append(Samples(short(card), arms, picture, moving if moving.is_file() else None))
    return found


def _shown(results: Path) -> dict[str, list[str]]:
    """The arms that the pictures of a report show, by data set."""
    try:
        return json.loads((results / "figures.json").read_text(encoding="utf-8"))["pictures"]
    except (OSError, json.JSONDecodeError, KeyError):
        return {}


def sample_grids(measured: Measured, pieces: Sequence[Piece]) -> dict[str, tuple[list[str], Grid]]:
    """For each data set the same prompts and noise by every arm, at the first, the few and the most steps."""
    grids = {}
    for card in measured.cards():
        found = [result for piece in pieces if card in piece.cards and (result := _samples(piece, card)) is not None]
        if found:
            kept = [_cut(measured, result, max(1, min(3, CELLS // len(found)))) for result in found]
            alike = [result for result in kept if _keys(result) == _keys(kept[0])]
            title = f"{measured.experiment.name}: {short(card)}, the first seed of every arm"
            grids[card] = [result.curve.label for result in alike], sample_grid(alike, title, **_shares(measured, card))
    return grids


def _shares(measured: Measured, card: str) -> dict[str, Any]:
    """Above the samples, where the deciding figure is a share: it and the first distance, means over the seeds."""
    deciding = measured.experiment.metric("")
    if not deciding.is_share:
        return {}
    figures = [deciding, *[one for one in measured.experiment.figures if one.better == LOWER and one.compares][:1]]
    values: dict[str, dict[int, list[float]]] = {}
    for arm in measured.experiment.shown:
        curves = [measured.curve(arm, card, one.name) for one in figures]
        values[arm] = {n: [curve[n].mean for curve in curves] for n in curves[0] if all(n in curve for curve in curves)}
    return {"figures": figures, "values": values}


def _samples(piece: Piece, card: str) -> CurveResult | None:
    """The samples that a piece kept: those of its arm's first seed."""
    found = load_curve(curve_folder(piece), short(card)) if piece.is_shown else None
    return None if found is None else replace(found, curve=replace(found.curve, label=piece.arm))


def _cut(measured: Measured, result: CurveResult, prompts: int) -> CurveResult:
    experiment = measured.experiment
    fewest = sorted(experiment.evaluation.steps)[: COLUMNS - 1]
    counts = sorted({*fewest, experiment.most} & set(result.samples))
    samples = {count: result.samples[count][:prompts] for count in counts}
    return replace(result, shown=result.shown[:prompts], samples=samples)


def _keys(result: CurveResult) -> list[str]:
    return [item.key for item in result.shown]


def as_jpeg(path: Path) -> bytes:
    """A picture's file, smaller."""
    from PIL import Image

    sink = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(sink, "JPEG", quality=78, optimize=True)
    return sink.getvalue()


def save_film(grid: Grid, path: Path, most_bytes: int, fps: float = 8.0) -> None:
    """Write the moving picture, played once: the best quality that fits ``most_bytes``, or the least, if none does."""
    for quality in FILM_QUALITIES:
        save_mp4(grid, path, fps=fps, loops=1, quality=quality)
        if path.stat().st_size <= most_bytes:
            break
