"""The layout of a model: what its configurations, or its published name, say before any weight is read.

Wan 2.1 has latents of 16 channels at 1/8 of a picture's sides, Wan 2.2's TI2V-5B of 48 at 1/16. Whatever counts pixels,
latents or tokens asks here. Nothing heavy is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.errors import UserError

_SHARED = {
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "1.3b": {**_SHARED, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14b": {**_SHARED, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "ti2v-5b": {
        **_SHARED,
        **{"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30},
    },
}
"""Dimensions of the Wan networks, by what their hub names end in: nothing is downloaded to plan."""

WAN22_VAE: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
"""The configuration of TI2V-5B's autoencoder, but for the statistics of its latents; the others have diffusers' own."""

SUPPORTED = "a text-to-video Wan 2.1 or AnyFlow network, or Wan-AI/Wan2.2-TI2V-5B-Diffusers"


@dataclass(frozen=True)
class Layout:
    """How pixels become latents, and these tokens.

    Attributes:
        channels: of the latents.
        temporal: pixel frames that a latent frame covers, but the first, which covers one.
        spatial: pixels of a side that a latent covers.
        patch: latents that a token covers, (frames, rows, columns).
    """

    channels: int = 16
    temporal: int = 4
    spatial: int = 8
    patch: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def of(cls, vae: Mapping[str, Any], network: Mapping[str, Any]) -> Layout:
        """Of an autoencoder's and a transformer's configuration; what they do not say is Wan 2.1's."""
        usual = cls()
        return cls(
            int(vae.get("z_dim") or usual.channels),
            int(vae.get("scale_factor_temporal") or usual.temporal),
            int(vae.get("scale_factor_spatial") or usual.spatial),
            tuple(network.get("patch_size") or usual.patch),  # type: ignore[arg-type]
        )

    @property
    def multiple(self) -> int:
        """Pixels of a token's side: both sides of a clip are a multiple of them."""
        return self.spatial * self.patch[1]

    @property
    def usual_clip(self) -> tuple[int, int, int, float]:
        """Frames, height, width and frames a second that Wan's networks of this layout were made for."""
        return (81, 480, 832, 16.0) if self.spatial == 8 else (121, 704, 1280, 24.0)

    def latents(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(F, C, H, W)`` of a clip's latents."""
        return (frames - 1) // self.temporal + 1, self.channels, height // self.spatial, width // self.spatial

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a clip in the network."""
        deep, _, high, wide = self.latents(frames, height, width)
        return (deep // self.patch[0]) * (high // self.patch[1]) * (wide // self.patch[2])

    def check(self, frames: int, height: int, width: int) -> None:
        """Refuse a clip size that cannot be encoded without cropping.

        Raises:
            UserError: ``frames`` is not ``temporal * n + 1``, or a side is no multiple of a token's.
        """
        temporal, multiple = self.temporal, self.multiple
        if frames < 1 or frames % temporal != 1 % temporal:
            below = max(frames - 1, 0) // temporal * temporal + 1
            near = f"{below} or {below + temporal}"
            raise UserError(f"frames is {frames}, but must be {temporal}n + 1: use {near} frames.")
        for name, side in (("height", height), ("width", width)):
            if side < multiple or side % multiple:
                below = max(side // multiple, 1) * multiple
                raise UserError(
                    f"{name} is {side} pixels, but must be a multiple of {multiple}: use {below} or {below + multiple}."
                )


def layout_of(weights: str, codec: str = "", field: str = "model.weights") -> Layout:
    """The layout of a model named by folder, run or hub id; what is not known yet is taken as Wan 2.1's.

    Args:
        weights: of the network; empty: of a new one, which takes what the autoencoder gives.
        codec: of its autoencoder, if that lies elsewhere.
        field: what names the network, for the sentence of the error.

    Raises:
        UserError: network and autoencoder do not go together.
    """
    network = _network_config_of(weights)
    vae = vae_config_of(codec or weights)
    likely = WAN22_VAE if network.get("in_channels") == WAN22_VAE["z_dim"] else {}  # of a network that lies alone
    found = Layout.of(likely if vae is None else vae, network)
    if vae is not None:
        check_channels(network.get("in_channels", found.channels), found, weights, codec, field)
    return found


def _network_config_of(model: str) -> dict[str, Any]:
    """A network's configuration, from its model's folder or published name; empty: not known."""
    return _config(model, "transformer") or PUBLISHED.get(published(model) or "", {})


def vae_config_of(model: str) -> dict[str, Any] | None:
    """An autoencoder's configuration, from its model's folder or published name; None: not known."""
    name = published(model)
    return _config(model, "vae") or (None if name is None else WAN22_VAE if name == "ti2v-5b" else {})


def check_channels(channels: int, layout: Layout, weights: str, codec: str, field: str = "model.weights") -> None:
    """That a network takes the latents of an autoencoder; ``field`` names the network.

    Raises:
        UserError: it does not.
    """
    if channels != layout.channels:
        raise UserError(
            f"{field}={weights!r} takes latents of {channels} channels, and the autoencoder of {codec or weights!r} "
            f"makes {layout.channels}: name a network and a codec (model.codec) that were made for each other"
        )


def heads_of(model: str) -> int | None:
    """Attention heads of a network named by folder, run or hub id; None: not known yet."""
    return _network_config_of(model).get("num_attention_heads")


def check_heads(size: int, heads: int) -> None:
    """That so many ranks can deal out a network's heads.

    Raises:
        UserError: they cannot.
    """
    if heads % size:
        fitting = max(number for number in (1, 2, 4, 8) if number < size and heads % number == 0)
        raise UserError(
            f"hardware.context={size} does not divide the network's {heads} attention heads, which the ranks that "
            f"share a clip deal out: set hardware.context={fitting}"
        )


def published(name: str) -> str | None:
    """Which of :data:`PUBLISHED` a model's name means, if any."""
    return next((size for size in PUBLISHED if re.search(rf"-{re.escape(size)}(?![a-z0-9])", name.lower())), None)


def check_network(model: str | Path) -> None:
    """Refuse a model that cannot become one flow map, by its folder's configurations or its published name.

    Raises:
        UserError: it has two networks, or one with parts that the flow-map network lacks.
    """
    owner, _, name = str(model).lower().partition("/")
    words = name.partition("@")[0].split("-")
    if owner == "wan-ai" and not Path(model).is_dir():
        if "a14b" in words:
            raise UserError(_two_networks(str(model)))
        if not {"t2v", "ti2v"} & set(words):
            raise UserError(f"{model} is no text-to-video network: take {SUPPORTED}.")
        return
    for place in (Path(model) / "model", Path(model)):
        if (place / "transformer").is_dir():
            return check_folder(place)


def check_folder(folder: Path) -> None:
    """:func:`check_network` of a pipeline's folder.

    Raises:
        UserError: it is refused.
    """
    index = _read(folder / "model_index.json")
    second = index.get("transformer_2") or [None]
    if (folder / "transformer_2").is_dir() or second[0] is not None or index.get("boundary_ratio") is not None:
        raise UserError(_two_networks(str(folder)))
    check_config(_read(folder / "transformer" / "config.json"), folder / "transformer")


def check_config(config: Mapping[str, Any], place: Path | str) -> None:
    """Refuse a published configuration whose network has parts that the flow-map network lacks.

    Raises:
        UserError: it has.
    """
    unsupported = {
        "image_dim": config.get("image_dim") is not None,
        "added_kv_proj_dim": config.get("added_kv_proj_dim") is not None,
        "in_channels": config.get("in_channels", 16) != config.get("out_channels", 16),
        "qk_norm": config.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads",
    }
    for name, refused in unsupported.items():
        if refused:
            why = " and gives another number, and a first frame stands among the latents here"
            raise UserError(
                f"{place} has {name} = {config.get(name)}{why * (name == 'in_channels')}: take {SUPPORTED}."
            )


def _two_networks(model: str) -> str:
    return (
        f"{model} holds two transformers (Wan 2.2 A14B), each for a part of the times, and a flow map, which jumps "
        f"from any time to any other, has to be one network: take {SUPPORTED}."
    )


def _config(model: str, part: str) -> dict[str, Any]:
    """A part's configuration in a model's or run's folder; empty if it is not there."""
    for place in (Path(model) / "model", Path(model)):
        if found := _read(place / part / "config.json"):
            return found
    return {}


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, which whoever loads the model reports."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
