"""A probe of controls: a small network that reads back from pixels what was done in a clip's frames.

It is trained on the data set's own training clips, and tells whether samples do what they were asked to. A judge must
be known: each number is read on real held-out clips first, and one that is not right there is left out, which is told.
Numbers are right at a correlation of 0.9, keys where 90 % of their states are, and more than one that never changes.

It sees each frame with the changes from the frame before and to the one after, and mixes what it finds over frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from anyflow.backbone.control_embedding import as_told, periods_of, ranges_of
from anyflow.data.controls import Control
from anyflow.data.decode import ClipShape
from anyflow.errors import UserError
from anyflow.evaluation.control_table import labels
from anyflow.evaluation.curve import HeldOut
from anyflow.evaluation.heldout import held_out
from anyflow.evaluation.measure import OnProgress
from anyflow.evaluation.probe import (
    KEPT,
    TRUSTED,
    convolutional_body,
    disturbed,
    fit,
    folder_of,
    read_probe,
    write_probe,
)
from anyflow.system.locks import locked

MOST_CLIPS = 512
"""Training clips that are looked at, and held-out ones."""


@dataclass(frozen=True)
class ControlProbeSettings:
    """How it sees clips and learns.

    Attributes:
        height: that frames are brought to.
        width: likewise.
        channels: of the convolutions.
        features: of a frame.
        frames_seen: frames in all that it learns from, the same ones again included: a minute on two cores.
        most_epochs: passes over the clips at most.
        batch_size: clips a step.
        lr: largest learning rate; it rises and falls in one cycle.
        seed: of weights, order and disturbances.
    """

    height: int = 48
    width: int = 72
    channels: tuple[int, ...] = (24, 32, 48, 64)
    features: int = 64
    frames_seen: int = 80_000
    most_epochs: int = 40
    batch_size: int = 8
    lr: float = 3e-3
    seed: int = 0


class ControlProbeNetwork(nn.Module):
    """Pictures of clips to numbers of every frame."""

    def __init__(self, settings: ControlProbeSettings, numbers: int) -> None:
        super().__init__()
        features = settings.features
        self.body = convolutional_body(9, settings.channels, features)
        self.mix = nn.Sequential(
            nn.Conv1d(features, features, 3, padding=1), nn.ReLU(), nn.Conv1d(features, numbers, 1)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """``[N, F, 3, H, W]`` in -1..1 to ``[N, F, W]``: normalised numbers, and logits of keys."""
        changes = pictures.diff(dim=1)
        none = torch.zeros_like(pictures[:, :1])
        windows = torch.cat([pictures, torch.cat([none, changes], 1), torch.cat([changes, none], 1)], dim=2)
        found = self.body(windows.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        return self.mix(found.transpose(1, 2)).transpose(1, 2)


class ControlProbe:
    """A trained probe of controls.

    Attributes:
        controls: what it reads, by name.
        reached: of each number on real held-out clips: its correlation, or the share of a key's states that are right;
            NaN where it never changes there.
    """

    def __init__(
        self,
        network: ControlProbeNetwork,
        settings: ControlProbeSettings,
        controls: Mapping[str, Control],
        reached: Sequence[float],
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.settings, self.controls, self.reached = settings, dict(controls), list(reached)
        self.is_key = are_keys(controls)

    @property
    def trusted(self) -> Tensor:
        """``[W]`` bool: the numbers that it reads well enough on real clips."""
        return torch.tensor([share >= TRUSTED for share in self.reached])

    def read(self, clips: Tensor) -> Tensor:
        """Normalised numbers ``[N, F, W]`` of uint8 clips ``[N, F, H, W, 3]``; keys are 0 or 1."""
        read = torch.cat([self.network(_pictures(part, self.settings)) for part in clips.split(8)])
        return torch.where(self.is_key, (read > 0).float(), read)

    def accuracies(self, clips: Tensor, items: Sequence[HeldOut]) -> dict[str, float]:
        """``control_correlation`` and ``key_states_right`` of the clips against what they were asked, trusted ones."""
        if any(item.controls is None for item in items) or not bool(self.trusted.any()):
            return {}
        found = agreement(self.read(clips), self.asked(items), self.is_key)
        figures: dict[str, float] = {}
        for name, kind in (("control_correlation", ~self.is_key), ("key_states_right", self.is_key)):
            chosen = found[self.trusted & kind]
            chosen = chosen[~chosen.isnan()]
            figures |= {name: float(chosen.mean())} if len(chosen) else {}
        return figures

    def asked(self, items: Sequence[HeldOut]) -> Tensor:
        """Normalised numbers ``[N, F, W]`` that clips were asked for; NaN: not known."""
        return normalised(torch.stack([torch.as_tensor(item.controls) for item in items]), self.controls)

    def partners(self, items: Sequence[HeldOut]) -> list[int] | None:
        """For each prompt the one whose controls differ most from its own; None: none do, or nothing is read well."""
        if len(items) < 2 or any(item.controls is None for item in items) or not bool(self.trusted.any()):
            return None
        asked = self.asked(items)
        apart = [self._apart(asked, own.expand_as(asked)).nan_to_num(0.0) for own in asked]
        chosen = [int(one.argmax()) if float(one.max()) > 0 else place for place, one in enumerate(apart)]
        return chosen if any(other != place for place, other in enumerate(chosen)) else None

    def gap(
        self, clips: Tensor, swapped: Tensor, items: Sequence[HeldOut], partners: Sequence[int]
    ) -> tuple[float, float | None]:
        """How much farther clips under their partners' controls are from their own ones than clips under these.

        Returns:
            The mean over clips, in half ranges of a number, and as a share of how far the partners' controls are.
        """
        asked = self.asked(items)
        own, other = (self._apart(self.read(of), asked) for of in (clips, swapped))
        whole = self._apart(asked[list(partners)], asked)
        seen = ~(own + other + whole).isnan()
        gap, most = float((other - own)[seen].mean()), float(whole[seen].mean())
        return gap, gap / most if most > 0 else None

    def _apart(self, one: Tensor, other: Tensor) -> Tensor:
        """Of each clip the mean distance of its trusted numbers, known in both: ``[N]``."""
        return (one - other)[..., self.trusted].abs().flatten(1).nanmean(dim=1)

    def notes(self) -> list[str]:
        """What is to be said beside figures that come from it."""
        names = read_labels(self.controls)
        told = [
            "does not change" if share != share else f"{100 * share:.0f} %" if is_key else f"{share:.2f}"
            for share, is_key in zip(self.reached, self.is_key.tolist(), strict=True)
        ]
        pairs = list(zip(names, told, self.trusted.tolist(), strict=True))
        used = ", ".join(f"{name} ({reached})" for name, reached, is_used in pairs if is_used)
        left = ", ".join(f"{name} ({reached})" for name, reached, is_used in pairs if not is_used)
        read = "controls read back from pixels, with their correlation or share of right states on real held-out clips"
        lines = [f"{read}: {used}"] if used else []
        if left:
            why = f"below {TRUSTED:g} on real held-out clips, so no figure uses them"
            why += "" if used else ", and whether a model obeys is not known"
            lines.append(f"controls that cannot be read back from pixels: {left}; {why}")
        return lines

    def save(self, folder: Path) -> None:
        """Write the probe: weights as safetensors, the rest as JSON."""
        controls = {name: control.to_dict() for name, control in self.controls.items()}
        reached = [None if share != share else share for share in self.reached]
        facts = {"settings": asdict(self.settings), "controls": controls, "reached": reached}
        write_probe(folder, self.network, facts)

    @classmethod
    def load(cls, folder: Path, controls: Mapping[str, Control]) -> ControlProbe | None:
        """The probe of a folder, None if there is none.

        Raises:
            UserError: what is there cannot be read.
        """

        def build(facts: dict[str, Any]) -> ControlProbe:
            channels = tuple(facts["settings"].pop("channels"))
            settings = ControlProbeSettings(channels=channels, **facts["settings"])
            reached = [float("nan") if share is None else float(share) for share in facts["reached"]]
            return cls(ControlProbeNetwork(settings, len(reached)), settings, controls, reached)

        return read_probe(folder, build)


def agreement(read: Tensor, asked: Tensor, is_key: Tensor) -> Tensor:
    """How well numbers ``[N, F, W]`` agree with those that were asked for, where these are known: ``[W]``.

    The correlation, or of keys the share of right states; NaN where what was asked never changes.
    """
    found = []
    for number, key in enumerate(is_key.tolist()):
        known = ~asked[..., number].isnan()
        one, other = read[..., number][known].double(), asked[..., number][known].double()
        if len(other) < 2 or float(other.std()) < 1e-6:
            found.append(float("nan"))
        elif key:
            found.append(float((one == other).double().mean()))
        else:
            one, other = one - one.mean(), other - other.mean()
            found.append(float((one * other).sum() / (one.norm() * other.norm()).clamp(min=1e-12)))
    return torch.tensor(found)


def normalised(controls: Tensor, described: Mapping[str, Control]) -> Tensor:
    """Numbers ``[..., W]`` near -1..1 as networks are told them; keys stay 0 and 1, cosines of angles come last."""
    facts = _facts(described)
    low, high = map(torch.tensor, ranges_of(facts))
    told = as_told(controls, low, high, periods_of(facts))
    is_key = are_keys(described)[: controls.shape[-1]]
    return torch.cat([torch.where(is_key, controls.float(), told[..., : len(is_key)]), told[..., len(is_key) :]], -1)


def are_keys(described: Mapping[str, Control]) -> Tensor:
    """``[W]`` bool: which numbers are a multi-hot control's; cosines of angles come last."""
    cosines = sum(turn > 0 for turn in periods_of(_facts(described)))
    is_key = [control.kind == "multi-hot" for control in described.values() for _ in range(control.width)]
    return torch.tensor(is_key + [False] * cosines)


def read_labels(described: Mapping[str, Control]) -> list[str]:
    """What each number that is read is called; of an angle there are two."""
    pairs = list(zip(labels(dict(described)), periods_of(_facts(described)), strict=True))
    return [name + " (sine)" * (turn > 0) for name, turn in pairs] + [
        f"{name} (cosine)" for name, turn in pairs if turn
    ]


def _facts(described: Mapping[str, Control]) -> dict[str, dict[str, Any]]:
    """As a network's configuration describes them."""
    return {name: asdict(control) for name, control in described.items()}


def train_control_probe(
    clips: Sequence[HeldOut],
    real: Sequence[HeldOut],
    controls: Mapping[str, Control],
    settings: ControlProbeSettings | None = None,
    on_progress: OnProgress | None = None,
) -> ControlProbe:
    """Train a probe on real clips with their controls, and measure it on others that it never saw."""
    settings = settings or ControlProbeSettings()
    targets = normalised(torch.stack([torch.as_tensor(clip.controls) for clip in clips]), controls)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = ControlProbeNetwork(settings, targets.shape[2])
    probe = ControlProbe(network, settings, controls, [1.0] * targets.shape[2])
    network.requires_grad_(True)
    seen = torch.cat([((_pictures(torch.as_tensor(clip.frames)[None], settings) + 1) * 127.5).byte() for clip in clips])
    epochs = max(2, min(settings.most_epochs, settings.frames_seen // max(1, seen.shape[0] * seen.shape[1])))

    def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor:
        whole = disturbed(seen[rows].flatten(1, 2).float() / 127.5 - 1, generator)
        return _loss(network(whole.unflatten(1, (-1, 3))), targets[rows], probe.is_key)

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(done, epochs, "epochs of the probe of controls")

    fit(network, settings, len(clips), epochs, loss_of, tell)
    network.eval().requires_grad_(False)
    read = torch.cat([probe.read(torch.as_tensor(clip.frames)[None]) for clip in real])
    probe.reached = _reached(read, probe.asked(real), probe.is_key)
    return probe


def _reached(read: Tensor, asked: Tensor, is_key: Tensor) -> list[float]:
    """The agreement; a key whose states are right no oftener than by never changing reaches nothing."""
    found = agreement(read, asked, is_key)
    pressed = asked.nanmean(dim=(0, 1))
    usual = torch.maximum(pressed, 1 - pressed)
    return torch.where(is_key & (found <= usual), torch.zeros_like(found), found).tolist()


def _loss(read: Tensor, asked: Tensor, is_key: Tensor) -> Tensor:
    """Of the numbers that are known."""
    known, told = ~asked.isnan(), asked.nan_to_num(0.0)
    keys = functional.binary_cross_entropy_with_logits(read, told.clamp(0, 1), reduction="none")
    rest = functional.smooth_l1_loss(read, told, reduction="none", beta=0.2)
    return (torch.where(is_key, keys, rest) * known).sum() / known.sum().clamp(min=1)


def _pictures(clips: Tensor, settings: ControlProbeSettings) -> Tensor:
    """Clips uint8 ``[N, F, H, W, 3]`` as the network takes them: ``[N, F, 3, height, width]`` in -1..1."""
    frames = clips.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    size = (settings.height, settings.width)
    small = functional.interpolate(frames.flatten(0, 1), size=size, mode="area")
    return small.unflatten(0, clips.shape[:2])


def control_probe_of(
    cards: Sequence[str],
    shape: ClipShape,
    controls: Mapping[str, Control],
    *,
    split: str = "train",
    heldout: str = "heldout",
    settings: ControlProbeSettings | None = None,
    root: Path = KEPT,
    on_progress: OnProgress | None = None,
) -> ControlProbe:
    """The probe of some cards' controls in a shape, from where it is kept or trained now.

    Raises:
        UserError: the card or a split is missing, or has too few clips.
    """
    settings = settings or ControlProbeSettings()
    told = [(name, *control.to_dict().items()) for name, control in controls.items()]
    facts = ("controls", astuple(shape), astuple(settings), told)
    folder = folder_of(cards, (split, heldout), facts, root)
    with locked(folder.with_name(f".{folder.name}.lock")):  # several may ask at once: one of them trains
        kept = ControlProbe.load(folder, controls)
        if kept is not None:
            return kept
        clips, real = (held_out(cards, name, shape, MOST_CLIPS, controls) for name in (split, heldout))
        if len(clips) < 2 or len(real) < 2:
            found = f"{len(clips)} and {len(real)} clips"
            raise UserError(f"{' and '.join(cards)}: controls cannot be learnt from {found}: give more")
        probe = train_control_probe(clips, real, controls, settings, on_progress)
        probe.save(folder)
    return probe
