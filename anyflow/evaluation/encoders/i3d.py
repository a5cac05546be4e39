"""I3D, the network that the Fréchet video distance (FVD) is made of, from a file of weights.

Inception-v1 with its kernels inflated in time (Carreira and Zisserman, arXiv 1705.07750, figure 3). FVD (Unterthiner et
al., arXiv 1812.01717) is the Fréchet distance of its answers before the softmax, of clips brought to 224 x 224.

The file is the PyTorch port that is passed around (``rgb_imagenet.pt``: layers named ``Mixed_3b.b1b.conv3d`` ...), as a
plain state dict or as safetensors. Figures compare with others of the same weights alone.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from anyflow.errors import UserError
from anyflow.system.files import file_sha256

SIDE = 224
"""Pixels of a side that the network was trained on; whole frames are stretched to it."""

LAST = "logits.conv3d.weight"
"""The layer that says how many classes there are."""

FEWEST = 9
"""Frames of a clip: time is halved three times, and the last pooling looks at two."""

MIXED = {
    "3b": (192, (64, 96, 128, 16, 32, 32)),
    "3c": (256, (128, 128, 192, 32, 96, 64)),
    "4b": (480, (192, 96, 208, 16, 48, 64)),
    "4c": (512, (160, 112, 224, 24, 64, 64)),
    "4d": (512, (128, 128, 256, 24, 64, 64)),
    "4e": (512, (112, 144, 288, 32, 64, 64)),
    "4f": (528, (256, 160, 320, 32, 128, 128)),
    "5b": (832, (256, 160, 320, 32, 128, 128)),
    "5c": (832, (384, 192, 384, 48, 128, 128)),
}
"""Inception blocks: channels that come in, and those of the branches (1x1; 1x1, 3x3; 1x1, 3x3; pool, 1x1)."""


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad with zeros so that a layer gives ``ceil(size / stride)``: TensorFlow's SAME, the odd one at the end."""
    pads: list[int] = []
    for size, width, step in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max((-(-size // step) - 1) * step + width - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads)


class _Pool(nn.MaxPool3d):
    """Largest value; what is padded counts as 0, and nothing that comes in is below 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_same(x, self.kernel_size, self.stride))  # type: ignore[arg-type]


class _Unit(nn.Module):
    """A convolution, normalised and rectified; the last one (``is_last``) has a bias instead."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1, *, is_last: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out, kernel, stride, bias=is_last)
        if not is_last:
            self.bn = nn.BatchNorm3d(out, eps=1e-3)
        self.is_last = is_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.is_last else functional.relu(self.bn(x))


class _Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, branches: tuple[int, ...]) -> None:
        super().__init__()
        one, narrow, wide, slim, small, pooled = branches
        self.b0 = _Unit(channels, one)
        self.b1a, self.b1b = _Unit(channels, narrow), _Unit(narrow, wide, 3)
        self.b2a, self.b2b = _Unit(channels, slim), _Unit(slim, small, 3)
        self.b3a, self.b3b = _Pool((3, 3, 3), stride=(1, 1, 1)), _Unit(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class I3d(nn.Sequential):
    """Clips ``[N, 3, F, 224, 224]`` in -1..1 to answers ``[N, classes, T, 1, 1]``, one for each ``T`` of its time."""

    def __init__(self, classes: int = 400) -> None:
        mixed = {f"Mixed_{name}": _Mixed(*sizes) for name, sizes in MIXED.items()}
        wide = {name: _Pool((1, 3, 3), stride=(1, 2, 2)) for name in ("MaxPool3d_2a_3x3", "MaxPool3d_3a_3x3")}
        layers: list[tuple[str, nn.Module]] = [
            ("Conv3d_1a_7x7", _Unit(3, 64, 7, 2)),
            ("MaxPool3d_2a_3x3", wide["MaxPool3d_2a_3x3"]),
            ("Conv3d_2b_1x1", _Unit(64, 64)),
            ("Conv3d_2c_3x3", _Unit(64, 192, 3)),
            ("MaxPool3d_3a_3x3", wide["MaxPool3d_3a_3x3"]),
            *((name, block) for name, block in mixed.items() if "_3" in name),
            ("MaxPool3d_4a_3x3", _Pool((3, 3, 3), stride=(2, 2, 2))),
            *((name, block) for name, block in mixed.items() if "_4" in name),
            ("MaxPool3d_5a_2x2", _Pool((2, 2, 2), stride=(2, 2, 2))),
            *((name, block) for name, block in mixed.items() if "_5" in name),
            ("avg_pool", nn.AvgPool3d((2, 7, 7), stride=1)),
            ("logits", _Unit(1024, classes, is_last=True)),
        ]
        super().__init__(OrderedDict(layers))


class I3dEncoder:
    """Frozen: the answers before the softmax, averaged over time.

    Attributes:
        name: of its distances: ``i3d_frechet`` (FVD, of these weights) and ``i3d_kernel``.
        source: the file and its digest.

    Raises:
        UserError: the file cannot be read, is a program instead of weights, or holds other weights.
    """

    name = "i3d"

    def __init__(
        self, path: Path, where: str = "--encoder", device: torch.device | str = "cpu", batch_size: int = 4
    ) -> None:
        weights = read_weights(path, where)
        model = I3d(len(weights[LAST]))
        model.load_state_dict(weights)
        self.model = model.eval().requires_grad_(False).to(device)
        self.device, self.batch_size = device, batch_size
        self.source = f"I3D weights {path.name}, sha256 {file_sha256(path)[:12]}"

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Features ``[N, classes]`` of uint8 clips ``[N, F, H, W, 3]`` (F >= 9), float64 on the CPU."""
        return torch.cat([self._encode(part) for part in clips.split(self.batch_size)])

    def _encode(self, clips: Tensor) -> Tensor:
        frames = clips.to(self.device).permute(0, 1, 4, 2, 3).flatten(0, 1).float()
        frames = functional.interpolate(frames, size=(SIDE, SIDE), mode="bilinear") * 2 / 255 - 1
        video = frames.unflatten(0, (len(clips), clips.shape[1])).transpose(1, 2)
        return self.model(video).mean((2, 3, 4)).double().cpu()


def read_weights(path: Path, where: str) -> Mapping[str, Tensor]:
    """The weights of an I3D from a file.

    Raises:
        UserError: the file cannot be read, is a program instead of weights, or holds other weights.
    """
    weights = _read(path, where)
    with torch.device("meta"):
        last = weights.get(LAST)
        wanted = I3d(400 if last is None or last.dim() == 0 else len(last)).state_dict()
    lacking = [name for name in wanted if name not in weights]
    needless = [name for name in weights if name not in wanted]
    unlike = [name for name in wanted if name in weights and weights[name].shape != wanted[name].shape]
    for what, names in (("lacks", lacking), ("has besides", needless), ("has another shape of", unlike)):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise UserError(
                f"{where} {path} holds no I3D weights (it {what} {names[0]}{more}): give the PyTorch port's, "
                "for example rgb_imagenet.pt"
            )
    return weights


def _read(path: Path, where: str) -> Mapping[str, Tensor]:
    """A state dict, without running anything that a file may hold."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a TorchScript file torch says first that it will try otherwise
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file: what it brings about is not ours to list
        raise UserError(
            f"{where} {path} cannot be read as weights alone ({_why(error)}): give a plain state dict or safetensors"
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{where} {path} is no state dict: give a plain one, or safetensors")
    return found


def _why(error: Exception) -> str:
    """What is wrong with a file, in words: torch's own are about its arguments."""
    told = str(error)
    if "TorchScript" in told:
        return "it is a TorchScript program, which is not run"
    if "Weights only load failed" in told:
        return "it holds objects beside tensors, which are not unpickled"
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else "it is damaged, or no such file"
