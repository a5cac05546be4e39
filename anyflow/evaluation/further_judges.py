"""The judges that a recipe, an experiment or a command names, besides the figures that are always measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anyflow.backbone.controls import ControlSettings
from anyflow.data.wanted import learnt_controls
from anyflow.evaluation.control_probe import control_probe_of
from anyflow.evaluation.encoders import CONTROLS, PROBE, load_encoders
from anyflow.evaluation.heldout import Prompts
from anyflow.evaluation.measure import OnProgress
from anyflow.evaluation.measurement import Judges, Labels
from anyflow.evaluation.probe import probe_of


def judges_of(
    choices: Sequence[str],
    where: str,
    prompts: Prompts,
    *,
    controls: ControlSettings | None = None,
    learnt_from: str = "train",
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
) -> Judges:
    """The further judges that are named.

    Args:
        choices: ``probe``, ``controls`` and published networks (:func:`anyflow.evaluation.encoders.check_encoders`).
        where: the option or field that they stand in, for messages.
        prompts: what is judged. The features of a probe compare clips of its own data set alone: of several data sets
            the probes read labels, and give no distance.
        controls: what the models are told; of those that are told none nothing is read back.
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
    if CONTROLS in choices and controls is None:
        notes = [*notes, f"{where} {CONTROLS}: the model is told no controls, so there is nothing to read back"]
    reader = None
    if CONTROLS in choices and controls is not None:
        known = learnt_controls(controls.controls, prompts.cards, prompts.split)
        reader = control_probe_of(
            prompts.cards, prompts.shape, known, split=learnt_from, heldout=prompts.split, on_progress=on_progress
        )
        notes = [*notes, *reader.notes()]
    compared = [probe for probe in probes if probe.is_trusted and len(probes) == 1]
    read: list[Labels] = [*probes, *([reader] if reader is not None else [])]
    told = [*notes, *(note for one in probes for note in one.notes())]
    return Judges([*encoders, *compared], read, told, reader)
