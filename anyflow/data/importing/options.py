"""What can be asked of an import: each option of ``anyflow data import`` is a field here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from anyflow.errors import UserError
from anyflow.system.option import option

_FORMATS = "lerobot, nuscenes, comma2k19, vpt, gf-minecraft, bdd100k, irasim, cosmos, huggingface, webdataset or folder"


@dataclass(frozen=True)
class ImportOptions:
    """What the user asks for."""

    format: str | None = option(None, f"{_FORMATS}; found out by itself.")
    domain: str | None = option(None, "driving, robotics, games, ...; without it the format's.")
    caption: str | None = option(None, 'A template over fields: "A robot: {task}, {camera}".')
    captions: Path | None = option(None, "A .csv, .jsonl or .json of recordings and captions.")
    default_caption: str | None = option(
        None, "For recordings without any; 'domain': the domain's own. Else they are refused."
    )
    frames: int = option(81, "Frames of a clip.", low=1)
    fps: float | None = option(None, "Frames a second; without it those of most of the first recordings.")
    size: tuple[int, int] | None = option(None, "WIDTHxHEIGHT; without it that of most of the first recordings.")
    stride: float | None = option(None, "Seconds from clip to clip; without it end to end.")
    scene_cuts: float = option(30.0, "Change, in levels of 255, that is a scene cut; 0: none.", low=0)
    min_motion: float = option(0.0, "Leave out clips that change less from frame to frame.", low=0)
    clips: int = option(0, "Clips of one recording at most; 0: all.", low=0)
    keep_duplicates: bool = option(False, "Keep clips that show the same.")
    heldout: float = option(0.05, "Share of episodes, scenes or routes that is held out.", low=0, high=0.9)
    group_by: str | None = option(None, "Field that says what is never torn apart.")
    cameras: tuple[str, ...] = option((), "Cameras, with commas; without it all.")
    views: str = option("apart", "Cameras of one moment: apart, or as one picture: wide, grid, or front+wrist.")
    limit: int = option(0, "Recordings at most, for a trial; 0: all.", low=0)
    licence: str = option("", "Of the footage, for the card.")
    description: str = option("", "A sentence for the card.")
    error_budget: float = option(0.01, "Share of recordings that may be unusable.", low=0, high=1)
    seed: int = option(0, "Of the choice of what is held out.")
    workers: int = option(2, "Processes of this machine; with --engine ray those of the cluster.", low=0)

    def check(self) -> None:
        """Compare every value with its range.

        Raises:
            UserError: one is outside.
        """
        for field in fields(self):
            value, low, high = getattr(self, field.name), field.metadata.get("low"), field.metadata.get("high")
            where = f"--{field.name.replace('_', '-')}"
            if high is not None and not low <= value <= high:
                raise UserError(f"{where} {value:g}: give a share from {low:g} to {high:g}")
            if low is not None and value < low:
                raise UserError(f"{where} {value:g}: give at least {low:g}")
