"""What can be asked of an import."""

from __future__ import annotations

from dataclasses import dataclass, field

from anyflow.data.importing.captions import Captions


@dataclass(frozen=True)
class ImportOptions:
    """What the user asks for.

    Attributes:
        format: a name of ``formats.FORMATS``; None finds out.
        domain: None takes the format's. licence, description: for the card.
        captions: where captions come from.
        frames: of a clip. fps, size (width, height): None takes those of the first recording.
        stride: seconds from one clip to the next; None puts them end to end.
        cut_threshold, min_motion, most: see :class:`Cutting`.
        keep_duplicates: keep clips that show what an earlier one shows.
        heldout: share of the groups (episodes, scenes, routes) that is held out.
        group_by: the field whose value tells what must not be torn apart; None takes the format's own.
        cameras: those to take; all if empty.
        limit: recordings at most, for a trial; 0 for all.
        error_budget: share of recordings that may be unusable.
        seed: of the choice of held-out groups. workers: processes; 0 works in this one.
    """

    format: str | None = None
    domain: str | None = None
    licence: str = ""
    description: str = ""
    captions: Captions = field(default_factory=Captions)
    frames: int = 81
    fps: float | None = None
    size: tuple[int, int] | None = None
    stride: float | None = None
    cut_threshold: float = 30.0
    min_motion: float = 0.0
    most: int = 0
    keep_duplicates: bool = False
    heldout: float = 0.05
    group_by: str | None = None
    cameras: tuple[str, ...] = ()
    limit: int = 0
    error_budget: float = 0.01
    seed: int = 0
    workers: int = 2
