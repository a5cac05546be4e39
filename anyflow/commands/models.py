"""A model named on the command line: its parts, and the shape of the clips that it was trained on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow.errors import UserError
from anyflow.recipe import list_recipes, load_recipe

if TYPE_CHECKING:
    from anyflow.backbone.codec import Codec
    from anyflow.backbone.protocol import FlowMapBackbone
    from anyflow.data.decode import ClipShape


def load_model(model: str, precision: str = "") -> tuple[Codec, FlowMapBackbone, float]:
    """Codec, network and the shift of its schedule, on the GPU in bfloat16 if there is one, else on the CPU in float32.

    Args:
        model: folder or hub id.
        precision: ``float32`` or ``bfloat16`` instead of the device's.

    Raises:
        UserError: the folder or hub name holds no such model.
    """
    import torch

    from anyflow.backbone.codec import Codec
    from anyflow.backbone.load import load_backbone, read_shift
    from anyflow.console import quiet_libraries

    quiet_libraries()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: torch.dtype = getattr(torch, precision or ("bfloat16" if device == "cuda" else "float32"))
    codec = Codec.from_folder(model, dtype=dtype, device=device)
    backbone = load_backbone(model, dtype=dtype, device=device)
    backbone.requires_grad_(False)
    return codec, backbone, read_shift(model)


def native_shape(
    model: str, *, frames: int | None, height: int | None, width: int | None, fps: float | None
) -> ClipShape:
    """The clip shape that a model was trained on, with what the user asks for instead; fps None is each clip's own.

    Raises:
        UserError: the model does not say (:func:`trained_shape`) and the user did not say all of it.
    """
    from anyflow.data.decode import ClipShape

    known = trained_shape(model)
    if known is None and None in (frames, height, width):
        raise UserError(f"--model {model} does not say its clip size: give --frames, --height and --width")
    usual = known or (1, 16, 16, 0.0)
    return ClipShape(frames or usual[0], height or usual[1], width or usual[2], fps or usual[3] or None)


Shape = tuple[int, int, int, float]
"""Frames, height, width, frames a second (0: each clip's own)."""


def trained_shape(model: str) -> Shape | None:
    """The clip shape that a model was trained on, if that is known.

    From the recipe beside the weights (a run), from the model file of the recipes that names these weights (a published
    model), or from the model's README (an export).
    """
    return _from_run(Path(model)) or _from_presets(model) or _from_readme(Path(model))


def negative_prompt(model: str) -> str:
    """The text that a model was trained to be steered away from, if that is known: from the same places."""
    for folder in (Path(model), Path(model).parent):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(str(folder / "recipe.yaml")).model.negative_prompt
    for name in list_recipes().get("models", []):
        preset = load_recipe("finetune/driving", model=name).model
        if preset.weights == model.rstrip("/"):
            return preset.negative_prompt
    return ""


def _from_run(folder: Path) -> Shape | None:
    for path in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if path.is_file():
            data = load_recipe(str(path)).data
            return data.frames, data.height, data.width, data.fps
    return None


def _from_readme(folder: Path) -> Shape | None:
    """From the usage lines of a model card that this project wrote."""
    path = folder / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    size = re.search(r"num_frames=(\d+), height=(\d+), width=(\d+)", text)
    fps = re.search(r"fps=([\d.]+)", text)
    if size is None or fps is None:
        return None
    return int(size[1]), int(size[2]), int(size[3]), float(fps[1].rstrip("."))


def _from_presets(model: str) -> Shape | None:
    for name in list_recipes().get("models", []):
        recipe = load_recipe("finetune/driving", model=name)
        if recipe.model.weights == model.rstrip("/"):
            return recipe.data.frames, recipe.data.height, recipe.data.width, recipe.data.fps
    return None
