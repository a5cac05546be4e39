"""Controls in diffusers' pipelines: what an arm, a wheel or keys do, embedded for a network. Needs torch alone.

This file goes with exported models that are told controls, beside their ``pipeline.py``, which takes ``controls=``. It
imports nothing of anyflow; anyflow's own networks embed controls by the same module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIG_KEY = "anyflow_controls"
"""Where a transformer's configuration has its controls; diffusers leaves it alone."""

MODULE = "control_embedder"
"""The name of the module within the transformer's ``condition_embedder``, and so the start of its weights' names."""

PREFIX = f"condition_embedder.{MODULE}."

LIMIT = 3.0
"""Normalised numbers further out are cut off: a sensor's rare spike must not drown everything else."""


class ControlEmbedder(nn.Module):
    """Numbers of pixel frames to an embedding of their latent frame; at first it is zero.

    Each number comes with a flag that says whether it is known: clips of several domains know some of them alone. A
    frame of which nothing is known has a learned vector of its own.

    Args:
        controls: name -> ``width``, ``kind`` and, of a continuous one, ``low``, ``high`` and (if any goes round)
            ``period`` of each number.
        width: of the hidden layers.
        pixel_frames: that a latent frame covers, but the first.
        dim: of the embedding.
    """

    def __init__(self, controls: Mapping[str, Mapping[str, Any]], width: int, pixel_frames: int, dim: int) -> None:
        super().__init__()
        self.controls, self.pixel_frames = controls, pixel_frames
        self.periods = periods_of(controls)
        inputs = 2 * pixel_frames * (len(self.periods) + sum(turn > 0 for turn in self.periods))
        last = nn.Linear(width, dim)
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)
        self.unknown = nn.Parameter(torch.empty(dim))
        self.low: Tensor
        self.high: Tensor
        self.set_ranges()

    def set_ranges(self) -> None:
        """The ranges of the numbers, from the configuration: no checkpoint carries them, nor does ``meta``."""
        for name, values in zip(("low", "high"), ranges_of(self.controls), strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device="cpu"), persistent=False)

    def nothing(self, batch: int) -> Tensor:
        """Controls of which nothing is known, equal for all frames: ``[B, 1, P, W]``."""
        return self.low.new_full((batch, 1, self.pixel_frames, len(self.low)), float("nan"))

    def forward(self, controls: Tensor) -> Tensor:
        """``[B, F, P, W]`` (NaN: not known) to ``[B, F, dim]`` float32."""
        flat = as_told(controls, self.low, self.high, self.periods).flatten(2)
        is_known = ~flat.isnan()
        numbers = torch.cat([flat.nan_to_num(0.0), is_known.float()], dim=2)
        embedded = self.layers(numbers.to(self.unknown.dtype)).float()
        return torch.where(is_known.any(dim=2, keepdim=True), embedded, self.unknown.float())


def ranges_of(controls: Mapping[str, Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Low and high of every number; keys are 0 or 1."""
    low: list[float] = []
    high: list[float] = []
    for facts in controls.values():
        is_key = facts.get("kind") == "multi-hot"
        low += [0.0] * facts["width"] if is_key else list(facts["low"])
        high += [1.0] * facts["width"] if is_key else list(facts["high"])
    return low, high


def periods_of(controls: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Of every number the length of a whole turn, if it goes round; 0: it does not."""
    return [turn for facts in controls.values() for turn in facts.get("period") or [0.0] * facts["width"]]


def as_told(controls: Tensor, low: Tensor, high: Tensor, periods: Sequence[float]) -> Tensor:
    """Numbers ``[..., W]`` as a network is told them: near -1..1; of those that go round the sine, the cosines last."""
    told, rounds = near_one(controls, low, high), [place for place, turn in enumerate(periods) if turn]
    if not rounds:
        return told
    turns = torch.tensor([periods[place] for place in rounds], device=controls.device)
    angles = controls[..., rounds].float() * (2 * math.pi / turns)
    told[..., rounds] = angles.sin()
    return torch.cat([told, angles.cos()], dim=-1)


def told_widths(controls: Mapping[str, Mapping[str, Any]]) -> str:
    """Names and widths, for messages."""
    return ", ".join(f"{name} ({facts['width']})" for name, facts in controls.items())


def near_one(controls: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Numbers ``[..., W]`` brought to -1..1 by their ranges, and cut off beyond ``LIMIT``."""
    span, middle = high - low, (high + low) / 2
    return (2 * (controls.float() - middle) / torch.where(span > 0, span, 2.0)).clamp(-LIMIT, LIMIT)


def by_latent_frame(controls: Tensor, pixel_frames: int) -> Tensor:
    """Controls of pixel frames ``[B, 1 + P * n, W]`` as latent frames cover them: ``[B, 1 + n, P, W]``.

    The first latent frame covers one pixel frame, whose numbers stand for all P.
    """
    first = controls[:, :1].unsqueeze(2).expand(-1, -1, pixel_frames, -1)
    return torch.cat([first, controls[:, 1:].unflatten(1, (-1, pixel_frames))], dim=1)


class SteeredEmbedding:
    """Mixed into a stock ``condition_embedder``: it adds the controls of each frame to the embedding of its time."""

    told: Tensor | None = None
    """``[B, F, dim]``, those of all frames of the video; None: nothing is known."""

    def forward(self, timestep: Tensor, *arguments: Any, **options: Any) -> Any:
        """As the stock one; the frames of ``timestep [B, f]`` are the last ones so far."""
        end = (options.get("far_cfg") or options["layout_cfg"])["total_frames"]
        self._waiting = self._of_frames(end - timestep.shape[1], end)
        return super().forward(timestep, *arguments, **options)  # type: ignore[misc]

    def forward_timestep(
        self, timestep: Tensor, delta_timestep: Tensor, encoder_hidden_states: Tensor, token_per_frame: int
    ) -> tuple[Tensor, Tensor]:
        """As the stock one, of some frames: the full ones come first, then the compressed ones before them."""
        stock: Any = self
        (batch, frames), dtype = timestep.shape, next(iter(stock.time_embedder.parameters())).dtype
        left = self._waiting.shape[1] - frames
        own, self._waiting = self._waiting[:, left:], self._waiting[:, :left]

        def embed(embedder: Any, times: Tensor) -> Tensor:
            return embedder(stock.timesteps_proj(times.reshape(-1)).to(dtype)).type_as(encoder_hidden_states)

        gate = stock.delta_emb_gate.to(dtype)
        time, delta = embed(stock.time_embedder, timestep), embed(stock.delta_embedder, delta_timestep)
        embedding = (1 - gate) * time + gate * delta
        embedding = embedding.unflatten(0, (batch, frames)).float() + own.repeat(batch // len(own), 1, 1)
        modulation = stock.time_proj(stock.act_fn(embedding).to(stock.time_proj.weight.dtype))
        both = (part.type_as(encoder_hidden_states) for part in (embedding, modulation))
        return tuple(part.repeat_interleave(token_per_frame, dim=1) for part in both)  # type: ignore[return-value]

    def _of_frames(self, start: int, end: int) -> Tensor:
        embedder = getattr(self, MODULE)
        if self.told is None:
            return embedder(embedder.nothing(1)).expand(-1, end - start, -1)
        if self.told.shape[1] < end:
            covered, needed = (1 + embedder.pixel_frames * (count - 1) for count in (self.told.shape[1], end))
            raise ValueError(f"controls cover {covered} frames, the video has {needed}: give a row for each of them")
        return self.told[:, start:end].to(embedder.unknown.device)


def steer(transformer: Any) -> None:
    """Let a transformer that diffusers has loaded hear its controls, if it was trained with any.

    Raises:
        ValueError: its weights are not where it was loaded from.
    """
    facts, embedder = transformer.config.get(CONFIG_KEY), transformer.condition_embedder
    if not facts or isinstance(embedder, SteeredEmbedding):
        return
    if not hasattr(embedder, MODULE):
        settings = (facts["controls"], facts["width"], facts["pixel_frames"])
        module = ControlEmbedder(*settings, embedder.time_proj.in_features)
        module.load_state_dict(_stored(Path(str(transformer.config.get("_name_or_path", "")))))
        setattr(embedder, MODULE, module.requires_grad_(False).to(embedder.time_proj.weight.device))
    kind = type(embedder)
    embedder.__class__ = type(f"Steered{kind.__name__}", (SteeredEmbedding, kind), {})


def _stored(folder: Path) -> dict[str, Tensor]:
    """The module's weights among those of a transformer's folder, float32."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for place in (folder, folder / "transformer"):
        for path in sorted(place.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118
                found |= {name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names}
    if not found:
        raise ValueError(f"{folder} has no weights of {PREFIX[:-1]}: load the pipeline from the exported folder")
    return found


class ToldControls:
    """Mixed into a pipeline: its call takes ``controls=``."""

    transformer: Any

    @torch.no_grad()
    def __call__(self, *arguments: Any, controls: Any = None, num_videos_per_prompt: int = 1, **options: Any) -> Any:
        """As the stock call.

        Args:
            arguments: of the stock call.
            controls: an array ``[F, W]``, or ``[B, F, W]`` with one for each prompt: a row for each frame, the numbers
                in the order and the units of ``anyflow_controls`` in ``transformer/config.json``; NaN: not known. As in
                the clips of a data set, row i of an action leads from frame i to the next. None: nothing is known.
            num_videos_per_prompt: of the stock call.
            options: of the stock call.

        Raises:
            ValueError: they have another width, too few rows, another number of prompts, or no finite numbers; or the
                model is told none.
        """
        embedder = self.transformer.condition_embedder
        options["num_videos_per_prompt"] = num_videos_per_prompt
        if controls is None or not isinstance(embedder, SteeredEmbedding):
            if controls is not None:
                raise ValueError("controls are given, and this model is told none")
            return super().__call__(*arguments, **options)  # type: ignore[misc]
        told = _embedded(controls, getattr(embedder, MODULE))
        prompt = arguments[0] if arguments else options.get("prompt")
        prompts = 1 if isinstance(prompt, str) else len(options["prompt_embeds"] if prompt is None else prompt)
        if len(told) not in (1, prompts):
            raise ValueError(
                f"controls are for {len(told)} videos, there are {prompts} prompts: give one array for each"
            )
        embedder.told = told.repeat_interleave(num_videos_per_prompt, dim=0)
        try:
            return super().__call__(*arguments, **options)  # type: ignore[misc]
        finally:
            embedder.told = None


def _embedded(controls: Any, module: ControlEmbedder) -> Tensor:
    """``[B, F, dim]`` of the rows that a user gives."""
    widths = [int(facts["width"]) for facts in module.controls.values()]
    wanted = f"give [frames, {sum(widths)}]: {told_widths(module.controls)}"
    try:
        rows = torch.as_tensor(controls, dtype=torch.float32, device=module.unknown.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"controls are no array of numbers: {wanted}") from error
    rows = rows[None] if rows.ndim == 2 else rows
    if rows.ndim != 3 or rows.shape[2] != sum(widths) or not rows.shape[1]:
        raise ValueError(f"controls are {list(rows.shape)}: {wanted}")
    if rows.isinf().any():
        raise ValueError("controls hold a number that is not finite: give NaN for what is not known")
    parts = rows.split(widths, dim=2)
    led = [
        _led_to(part) if facts.get("at") == "transition" else part
        for part, facts in zip(parts, module.controls.values(), strict=True)
    ]
    whole = 1 + (rows.shape[1] - 1) // module.pixel_frames * module.pixel_frames
    return module(by_latent_frame(torch.cat(led, dim=2)[:, :whole], module.pixel_frames))


def _led_to(rows: Tensor) -> Tensor:
    """Of an action what led to each frame ``[B, F, W]``; nothing is known of the first."""
    return torch.cat([torch.full_like(rows[:, :1], float("nan")), rows[:, :-1]], dim=1)
