"""The probe of a data set: trained once on its training clips, measured on held-out ones, kept under runs/probes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

from anyflow.curves import held_out
from anyflow.data.decode import ClipShape
from anyflow.data.reader import find_split
from anyflow.evaluation.probe import Probe, ProbeSettings, train_probe

KEPT = Path("runs/probes")


def probe_of(
    card: str,
    shape: ClipShape,
    *,
    split: str = "train",
    heldout: str = "heldout",
    settings: ProbeSettings | None = None,
    root: Path = KEPT,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Probe:
    """The probe of a card's clips in a shape, from where it is kept or trained now.

    Other shards, another shape or other settings are another probe.

    Raises:
        UserError: the card or a split is missing, or its clips have nothing to learn from.
    """
    settings = settings or ProbeSettings()
    folders = [str(find_split(card, name).folder) for name in (split, heldout)]
    indices = [Path(folder) / "index.json" for folder in folders]
    told = [index.read_text(encoding="utf-8") if index.is_file() else str(index) for index in indices]
    facts = repr((told, astuple(shape), astuple(settings)))
    folder = root / f"{Path(card).stem}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    kept = Probe.load(folder)
    if kept is not None:
        return kept
    probe = train_probe(held_out([card], split, shape), held_out([card], heldout, shape), settings, on_progress)
    probe.save(folder)
    return probe
