"""The README of an exported model: what it is, what it was trained on and how, and how to use it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from anyflow.backbone.full import FULL_FILE
from anyflow.backbone.guidance import Guidance
from anyflow.flowmap.samplers import SAMPLERS, SamplerKind
from anyflow.system.tables import markdown_table


@dataclass(frozen=True)
class ModelCard:
    """What an exported folder says about itself. Markdown; every field but the title may stay empty."""

    title: str
    licence: str = "other"
    """SPDX identifier in lower case, as the Hub writes it (``apache-2.0``); no freer than base model and data allow."""
    base_model: str = ""
    """Hub name or path of what the training started from."""
    summary: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    """Dataset to its licence and provenance."""
    recipe: str = ""
    """The complete recipe as YAML."""
    figures: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    """Measured quality: row (for instance the number of steps) to column to value."""
    size: tuple[int, int, int] = (81, 480, 832)
    """Frames, height, width that it was trained at."""
    fps: float = 16.0
    """Frames a second of what it makes."""
    own_rates: bool = False
    """Whether its training left every clip at its own frame rate."""
    limits: str = ""
    """What it cannot do."""
    causal: bool = False
    """Whether it makes a video chunk by chunk; the export knows."""
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The controls that it is told, as its configuration describes them; the export knows."""
    given: bool = False
    """Whether its first frames may be given, as it was trained to take them."""
    exact: bool = False
    """Whether diffusers' own pipeline is not enough for a bidirectional network; the export knows."""
    sampler: SamplerKind = "flowmap"
    """How it is sampled."""
    guidance: Guidance | None = None
    """Of its samples, if the weights have none."""
    full: tuple[str, ...] = ()
    """Modules trained in full beside an adapter, whose weights lie in a file of their own; the export knows."""

    def render(self, lora: bool = False) -> str:
        """The text of README.md, with the Hub's header."""
        data = "\n".join(f"- **{name}**: {about}" for name, about in self.data.items())
        sections = [
            self._header(lora),
            f"# {self.title}",
            self.summary,
            f"## Use\n\n{self._usage(lora)}",
            f"## Figures\n\n{_table(self.figures)}" if self.figures else "",
            f"## Data\n\n{data}" if data else "",
            f"## Recipe\n\n```yaml\n{self.recipe.strip()}\n```" if self.recipe else "",
            f"## Limits\n\n{self.limits}" if self.limits else "",
        ]
        return "\n\n".join(section for section in sections if section) + "\n"

    def _header(self, lora: bool) -> str:
        lines = ["---", f"license: {self.licence}", "library_name: diffusers", "pipeline_tag: text-to-video"]
        if self.base_model.count("/") == 1 and not self.base_model.startswith((".", "/")):
            lines.append(f"base_model: {self.base_model}")
        lines += ["tags:", "- anyflow", "- flow-map", *(["- lora"] if lora else []), "---"]
        return "\n".join(lines)

    def _usage(self, lora: bool) -> str:
        size = "num_frames={}, height={}, width={}".format(*self.size)
        if SAMPLERS[self.sampler].usage and not lora:
            command = 'anyflow sample "..." --model path/to/this/folder --steps 4'
            told = [SAMPLERS[self.sampler].usage, f"Trained on clips of {size}, fps={self.fps:g}."]
            told += [OWN_RATES] * self.own_rates
            if self.guidance is not None and self.guidance.told:
                told.insert(1, f"It has no guidance in its weights, and is sampled with {self.guidance.told}.")
            return "\n\n".join([f"```sh\n{command}\n```", *told])
        place = self.base_model if lora else "."
        has_code = self.causal or ((self.told or self.exact) and not lora)
        kind = "DiffusionPipeline" if has_code else "AnyFlowPipeline"
        corrected = f', custom_pipeline="{place}", trust_remote_code=True' if has_code else ""
        rows = list(_told_numbers(self.told))
        load = [f'pipe = {kind}.from_pretrained("{place}"{corrected})']
        asked = "controls=controls, " if rows and not lora else ""
        if asked:
            load.append(f"controls = ...  # [{self.size[0]}, {len(rows)}]: the numbers below, a row for each frame")
        if lora:
            load.append('pipe.load_lora_weights(".")')
        if lora and self.full:
            load.append(f"# trained in full beside it: {', '.join(self.full)}")
            load.append(f'pipe.transformer.load_state_dict(load_file("{FULL_FILE}"), strict=False)')
        code = [
            f"from diffusers import {kind}",
            "from diffusers.utils import export_to_gif",
            *(["from safetensors.torch import load_file"] if lora and self.full else []),
            "",
            *load,
            f'video = pipe("...", {asked}num_inference_steps=4, {size}, output_type="pil").frames[0]',
            f'export_to_gif(video, "video.gif", fps={self.fps:g})',
        ]
        hints = ["Any number of steps works, from 1 up. Guidance is in the weights: keep `guidance_scale` at 1."]
        hints += [OWN_RATES] * self.own_rates + [_LORA_HINT] * lora + [_CAUSAL_HINT] * self.causal
        hints += [_EXACT_HINT] * (self.exact and not lora)
        if rows:
            numbers = "\n".join(markdown_table(["control", "unit", "from", "to"], rows, "llr"))
            hints += [f"{_TOLD_LORA_HINT if lora else _TOLD_HINT} {_NUMBERS_HINT}", numbers]
        return "\n".join(["```python", *code, "```", "", "\n\n".join(hints)])


def for_comfyui(readme: str, name: str) -> str:
    """An adapter's README, whose use is that of the file ``name.safetensors`` in ComfyUI."""
    use = (
        f"Put `{name}.safetensors` into ComfyUI's `models/loras`, and load it onto the base.\n\n"
        "ComfyUI's Wan knows one time, so it leaves `delta_embedding` out and says so in its log. There the adapter "
        "brings its domain at a usual number of steps. For few steps, sample by `anyflow sample` or diffusers."
    )
    return re.sub(r"(?<=## Use\n\n).*?(?=\n\n## |\Z)", lambda _: use, readme, count=1, flags=re.DOTALL)


OWN_RATES = "Each clip of its training kept its own frame rate."

_LORA_HINT = (
    "The base must be an any-step pipeline. A plain Wan checkpoint is none: `anyflow export RUN --to FOLDER` merges "
    "its adapter into a pipeline of its own."
)

_CAUSAL_HINT = (
    "This network makes a video chunk by chunk, and its first frames can be given: `pipe(..., video=frames)`. "
    "`pipeline.py` is diffusers' `AnyFlowFARPipeline` with its cached attention corrected (the stock one attends to "
    "padding); it is short, read it before you trust it. `AnyFlowFARPipeline.from_pretrained` loads this folder too, "
    "with that defect: call `correct_attention(pipe.transformer)` of `pipeline.py` after it."
)


_EXACT_HINT = (
    "Its first frames can be given: `pipe(..., video=frames)`. `pipeline.py` is diffusers' `AnyFlowPipeline` with the "
    "times of given frames corrected (the stock one moves them); it is short, read it before you trust it. "
    "`AnyFlowPipeline.from_pretrained` loads this folder too, and is right where no frames are given."
)

_TOLD_HINT = (
    "This network is told what is done in each frame: `pipe(..., controls=array)` takes a row of numbers a frame, NaN "
    "where one is not known. Load it with its `pipeline.py`: diffusers' own pipelines leave the controls out. While it "
    "loads, diffusers warns of `anyflow_controls` and `control_embedder`, which `pipeline.py` reads itself."
)

_TOLD_LORA_HINT = (
    "It was trained with controls. What embeds them is in the file of weights trained in full. A base that is not told "
    "these controls has no place for it, so that the lines above leave them out. The run's folder `model`, or `anyflow "
    "export RUN --to FOLDER`, is a pipeline with base, adapter and controls, whose call takes `controls=`."
)

_NUMBERS_HINT = "These are the controls' numbers, with the range that most of them had in training:"


def _told_numbers(controls: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Name, unit and range of every number, in the order of an array's columns."""
    for name, facts in controls.items():
        width = facts["width"]
        low, high = (facts.get(side) or [float(side == "high")] * width for side in ("low", "high"))
        units, numbers = facts.get("unit") or [""] * width, facts.get("numbers") or range(width)
        for number, unit, *ends in zip(numbers, units, low, high, strict=True):
            yield name if width == 1 else f"{name}.{number}", str(unit), f"{ends[0]:g}", f"{ends[1]:g}"


def _table(rows: Mapping[str, Mapping[str, float | str]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = ([label, *(_cell(row.get(name, "")) for name in columns)] for label, row in rows.items())
    return "\n".join(markdown_table(["", *columns], cells))


def _cell(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
