"""A probe: a small network that reads a domain's own labels (task, scene, lane, speed ...) from the pixels of a clip.

It is trained on the labels that the simulator or the importer wrote beside real clips, and judges generated ones: does
a sample show the object, the scene, the manoeuvre that its prompt names? A judge must be known: of each label its
accuracy on real held-out clips is measured and told, and a label that it reads wrong in more than a tenth is not used.
The layer before its answers also gives features of whole clips, for distances that see what matters in this domain.

Clips of any size and length are brought to one small shape, all frames as channels of one picture: a whole training
takes a minute or two on two cores.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from anyflow.data.decode import ClipShape
from anyflow.data.reader import find_split
from anyflow.errors import UserError
from anyflow.evaluation.curve import HeldOut
from anyflow.evaluation.heldout import held_out
from anyflow.evaluation.measure import OnProgress
from anyflow.system.files import replacing, write_atomically
from anyflow.system.locks import locked

TRUSTED = 0.9
"""Accuracy on real held-out clips below which a label is not used."""

MOST_VALUES = 16
"""A label of more values is a name or a number, and is not learnt."""

FEWEST = 8
"""A value of fewer training clips is not learnt: clips that show it are left out of this label."""


KEPT = Path("runs/probes")
"""Where probes are kept."""


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe sees clips and learns.

    Attributes:
        frames: that a clip is thinned out to.
        height: that its frames are brought to.
        width: likewise.
        channels: of the four layers.
        features: width of the layer before the answers.
        epochs: passes over the training clips.
        batch_size: clips a step.
        lr: largest learning rate; it rises and falls in one cycle.
        seed: of weights, order and disturbances.
    """

    frames: int = 9
    height: int = 32
    width: int = 48
    channels: tuple[int, ...] = (32, 64, 96, 128)
    features: int = 64
    epochs: int = 20
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0


def convolutional_body(inputs: int, channels: Sequence[int], features: int) -> nn.Sequential:
    """Pictures ``[N, inputs, H, W]`` to features ``[N, features]``, by a layer for each number of channels."""
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise([inputs, *channels])):
        size = 5 if index == 0 else 3
        convolution = nn.Conv2d(before, after, size, stride=2, padding=size // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    # Where something is matters (which lane), so the last maps are not averaged away but into six places.
    layers += [nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(6 * channels[-1], features), nn.ReLU()]
    return nn.Sequential(*layers)


class ProbeNetwork(nn.Module):
    """Clips to features ``[N, D]``, and features to answers, one for each label."""

    def __init__(self, settings: ProbeSettings, labels: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.body = convolutional_body(3 * settings.frames, settings.channels, settings.features)
        self.heads = nn.ModuleDict({name: nn.Linear(settings.features, len(kinds)) for name, kinds in labels.items()})

    def forward(self, pictures: Tensor) -> Tensor:
        """Features of pictures ``[N, 3 * frames, H, W]`` in -1..1."""
        return self.body(pictures)


class Probe:
    """A trained probe.

    Attributes:
        name: of its distances: ``probe_frechet`` and ``probe_kernel``.
        domain: whose clips it judges.
        labels: the values that it tells apart, by label.
        accuracy: share of real held-out clips that it reads right, by label.
    """

    name = "probe"

    def __init__(
        self,
        network: ProbeNetwork,
        settings: ProbeSettings,
        domain: str,
        labels: Mapping[str, Sequence[str]],
        accuracy: Mapping[str, float],
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.settings, self.domain, self.labels, self.accuracy = settings, domain, labels, accuracy

    def __call__(self, clips: Tensor) -> Tensor:
        """Features ``[N, D]`` of uint8 clips ``[N, F, H, W, 3]``, float64."""
        return torch.cat([self.network(pictures(part, self.settings)) for part in clips.split(64)]).double()

    def read(self, clips: Tensor) -> dict[str, list[str]]:
        """The value of each label in each clip, trusted or not."""
        features = self(clips).float()
        return {
            name: [self.labels[name][index] for index in head(features).argmax(1).tolist()]
            for name, head in self.network.heads.items()
        }

    def accuracies(self, clips: Tensor, items: Sequence[HeldOut]) -> dict[str, float]:
        """``probe_LABEL_right``: the share of clips that show what was asked for, of trusted labels, in this domain."""
        read, found = self.read(clips), {}
        for name in self.labels:
            asked = [_value(item, name) if item.domain == self.domain else None for item in items]
            right = [one == other for one, other in zip(read[name], asked, strict=True) if other is not None]
            if self.accuracy[name] >= TRUSTED and right:
                found[f"probe_{name}_right"] = sum(right) / len(right)
        return found

    @property
    def is_trusted(self) -> bool:
        """Whether it reads any label well enough: else its features are worth nothing either."""
        return any(share >= TRUSTED for share in self.accuracy.values())

    def notes(self) -> list[str]:
        """What is to be said of each label beside figures that come from it."""
        return [
            f"probe of {self.domain}, {name}: right in {100 * share:.0f} % of real held-out clips"
            + ("" if share >= TRUSTED else f"; below {100 * TRUSTED:.0f} %, so it is not used")
            for name, share in self.accuracy.items()
        ]

    def save(self, folder: Path) -> None:
        """Write the probe: weights as safetensors, the rest as JSON."""
        facts = {"domain": self.domain, "labels": self.labels, "accuracy": self.accuracy}
        write_probe(folder, self.network, {**facts, "settings": asdict(self.settings)})

    @classmethod
    def load(cls, folder: Path) -> Probe | None:
        """The probe of a folder, None if there is none.

        Raises:
            UserError: what is there cannot be read.
        """

        def build(facts: dict[str, Any]) -> Probe:
            channels = tuple(facts["settings"].pop("channels"))
            settings = ProbeSettings(channels=channels, **facts.pop("settings"))
            return cls(ProbeNetwork(settings, facts["labels"]), settings, **facts)

        return read_probe(folder, build)


class _WithNetwork(Protocol):
    @property
    def network(self) -> nn.Module: ...


_Kept = TypeVar("_Kept", bound=_WithNetwork)


def write_probe(folder: Path, network: nn.Module, facts: Mapping[str, Any]) -> None:
    """Keep a probe: weights as safetensors, the rest as JSON."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "probe.safetensors") as weights:
        save_file(network.state_dict(), weights)
    about = json.dumps(facts, indent=1) + "\n"
    write_atomically(folder / "probe.json", about)  # last: who finds it finds the weights


def read_probe(folder: Path, build: Callable[[dict[str, Any]], _Kept]) -> _Kept | None:
    """The probe of a folder, which ``build`` makes of its facts and the weights fill; None if there is none.

    Raises:
        UserError: what is there cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / "probe.json").is_file():
        return None
    try:
        probe = build(json.loads((folder / "probe.json").read_text(encoding="utf-8")))
        probe.network.load_state_dict(load_file(folder / "probe.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no whole probe ({error}): delete it, and it is trained again") from error
    return probe


class Learning(Protocol):
    """How a probe's weights are learnt: what the settings of each kind of probe have."""

    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def seed(self) -> int: ...


def fit(
    network: nn.Module,
    learning: Learning,
    clips: int,
    epochs: int,
    loss_of: Callable[[Tensor, torch.Generator], Tensor | None],
    tell: Callable[[int], None],
) -> None:
    """Train a probe's network: AdamW, its rate one cycle.

    Args:
        network: left in training mode.
        learning: batch, rate and seed of the order.
        clips: how many there are.
        epochs: passes over them.
        loss_of: of some rows, with a generator for what disturbs them; None: there is nothing to learn in them.
        tell: called with the number of passes done.
    """
    generator = torch.Generator().manual_seed(learning.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning.lr, weight_decay=0.05)
    steps = epochs * -(-clips // learning.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning.lr, total_steps=steps)
    for epoch in range(epochs):
        network.train()
        for rows in torch.randperm(clips, generator=generator).split(learning.batch_size):
            loss = loss_of(rows, generator)
            optimizer.zero_grad()
            if loss is not None:
                loss.backward()
                optimizer.step()
            schedule.step()
        tell(epoch + 1)


def pictures(clips: Tensor, settings: ProbeSettings) -> Tensor:
    """Clips uint8 ``[N, F, H, W, 3]`` as the network takes them: ``[N, 3 * frames, height, width]`` in -1..1."""
    chosen = torch.linspace(0, clips.shape[1] - 1, settings.frames).round().long()
    frames = clips[:, chosen].permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 127.5 - 1
    size = (settings.height, settings.width)
    return frames if frames.shape[-2:] == size else functional.interpolate(frames, size=size, mode="area")


def labels_of(clips: Sequence[HeldOut]) -> dict[str, list[str]]:
    """The labels that can be learnt, each with its values: at least two values, each in enough clips, not too many."""
    names = sorted({name for clip in clips for name in clip.attributes})
    counts = {name: Counter(value for clip in clips if (value := _value(clip, name)) is not None) for name in names}
    kept = {name: sorted(value for value, seen in count.items() if seen >= FEWEST) for name, count in counts.items()}
    return {name: values for name, values in kept.items() if len(values) >= 2 and len(counts[name]) <= MOST_VALUES}


def train_probe(
    clips: Sequence[HeldOut],
    real: Sequence[HeldOut],
    settings: ProbeSettings | None = None,
    on_progress: OnProgress | None = None,
) -> Probe:
    """Train a probe on real clips of one domain, and measure it on others that it never saw.

    Raises:
        UserError: the clips have no label with two values or more.
    """
    settings, labels = settings or ProbeSettings(), labels_of(clips)
    if not labels:
        raise UserError(
            "the training clips have no attribute of two values or more that each stand beside at least "
            f"{FEWEST} clips: a probe has nothing to learn; write attributes into the shards, or do without a probe"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = ProbeNetwork(settings, labels)
    # thinned out and shrunk once; as bytes, since thousands of clips are in memory
    seen = torch.cat([_bytes(pictures(torch.as_tensor(clip.frames)[None], settings)) for clip in clips])
    targets = {name: torch.tensor([_index(clip, name, values) for clip in clips]) for name, values in labels.items()}

    def loss_of(rows: Tensor, generator: torch.Generator) -> Tensor | None:
        features = network(disturbed(seen[rows].float() / 127.5 - 1, generator))
        losses = [
            functional.cross_entropy(head(features), targets[name][rows], ignore_index=-1)
            for name, head in network.heads.items()
            if bool((targets[name][rows] >= 0).any())
        ]
        return torch.stack(losses).sum() if losses else None

    def tell(done: int) -> None:
        if on_progress is not None:
            on_progress(done, settings.epochs, "epochs of the probe")

    fit(network, settings, len(clips), settings.epochs, loss_of, tell)
    probe = Probe(network, settings, clips[0].domain, labels, dict.fromkeys(labels, 1.0))
    right = probe.accuracies(torch.stack([torch.as_tensor(clip.frames) for clip in real]), real)
    probe.accuracy = {name: right.get(f"probe_{name}_right", 0.0) for name in labels}
    return probe


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
    folder = folder_of([card], (split, heldout), (astuple(shape), astuple(settings)), root)
    with locked(folder.with_name(f".{folder.name}.lock")):  # several may ask at once: one of them trains
        kept = Probe.load(folder)
        if kept is not None:
            return kept
        probe = train_probe(held_out([card], split, shape), held_out([card], heldout, shape), settings, on_progress)
        probe.save(folder)
    return probe


def folder_of(cards: Sequence[str], splits: Sequence[str], facts: tuple[object, ...], root: Path) -> Path:
    """Where a probe of some cards is kept, by their shards and other ``facts``. The folder above it is made.

    Raises:
        UserError: a card or a split is missing.
    """
    indices = [Path(str(find_split(card, name).folder)) / "index.json" for card in cards for name in splits]
    told = [index.read_text(encoding="utf-8") if index.is_file() else str(index) for index in indices]
    digest = hashlib.sha256(repr((told, *facts)).encode()).hexdigest()
    root.mkdir(parents=True, exist_ok=True)
    return root / f"{Path(cards[0]).stem}-{digest[:12]}"


def disturbed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Training clips as a codec or a generator might leave them: some blurred, some noisy, all a little shifted."""
    blur, noise, shift = torch.rand(3, generator=generator).tolist()
    if blur < 0.4:
        pictures = functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
    if noise < 0.4:
        pictures = pictures + 0.1 * noise * torch.randn(pictures.shape, generator=generator)
    return pictures.roll((int(shift * 5) - 2, int(shift * 25) % 5 - 2), dims=(-2, -1))


def _value(clip: HeldOut, name: str) -> str | None:
    value = clip.attributes.get(name)
    return str(value) if isinstance(value, str | int | bool) else None


def _index(clip: HeldOut, name: str, values: Sequence[str]) -> int:
    value = _value(clip, name)
    return values.index(value) if value in values else -1


def _bytes(pictures: Tensor) -> Tensor:
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte()
