"""The probe of a data set: trained once on its training clips, measured on held-out ones, kept under runs/probes.

And all judges that a recipe, an experiment or a command names, the probe among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from anyflow.data.decode import ClipShape
from anyflow.data.reader import find_split
from anyflow.evaluation.encoders import PROBE, load_encoders
from anyflow.evaluation.heldout import Prompts, held_out
from anyflow.evaluation.measure import OnProgress
from anyflow.evaluation.measurement import Judges
from anyflow.evaluation.probe import Probe, ProbeSettings, train_probe
from anyflow.system.locks import locked

KEPT = Path("runs/probes")


def probe_of(
    card: str,
    shape: ClipShape,
    *,
    split: str = "train",
    heldout: str = "heldout",
    settings: ProbeSettings | None = None,
    root: Path = KEPT,
    on_progress: OnProgress | None = None,
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):  # several may ask at once: one of them trains
        kept = Probe.load(folder)
        if kept is not None:
            return kept
        probe = train_probe(held_out([card], split, shape), held_out([card], heldout, shape), settings, on_progress)
        probe.save(folder)
    return probe


def judges_of(
    choices: Sequence[str],
    where: str,
    prompts: Prompts,
    *,
    learnt_from: str = "train",
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> Judges:
    """The further judges that are named.

    Args:
        choices: ``probe`` and published networks (:func:`anyflow.evaluation.encoders.check_encoders`).
        where: the option or field that they stand in, for messages.
        prompts: what is judged. The features of a probe compare clips of its own data set alone: of several data sets
            the probes read labels, and give no distance.
        learnt_from: split that probes are trained on; they are measured on that of the prompts.
        device: of the published networks.
        on_progress: of a probe that must be trained.

    Raises:
        UserError: weights are not what they should be, or a data set has no labels to learn.
    """
    encoders, notes = load_encoders(choices, where, device)
    probes = [
        probe_of(card, prompts.shape, split=learnt_from, heldout=prompts.split, on_progress=on_progress)
        for card in (prompts.cards if PROBE in choices else ())
    ]
    compared = [probe for probe in probes if probe.is_trusted and len(probes) == 1]
    return Judges([*encoders, *compared], probes, [*notes, *(note for one in probes for note in one.notes())])
