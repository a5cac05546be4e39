"""The judges that a recipe, an experiment or a command names, besides the figures that are always measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anyflow.evaluation.encoders import PROBE, load_encoders
from anyflow.evaluation.heldout import Prompts
from anyflow.evaluation.measure import OnProgress
from anyflow.evaluation.measurement import Judges
from anyflow.evaluation.probe import probe_of


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
