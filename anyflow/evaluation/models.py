"""A model named on the command line: its parts, and the shape of the clips that it was trained on."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow.backbone.layout import check_network, layout_of
from anyflow.errors import UserError
from anyflow.flowmap.samplers import SAMPLERS, SamplerKind
from anyflow.recipe import Recipe, is_hub_id, list_recipes, load_recipe

if TYPE_CHECKING:
    from anyflow.backbone.codec import Codec
    from anyflow.backbone.guidance import Guidance
    from anyflow.backbone.protocol import FlowMapBackbone
    from anyflow.data.decode import ClipShape


MODEL = ("model_index.json", "model", "transformer")
"""What a model's folder has one of."""


def check_model(model: str, option: str = "--model") -> None:
    """Refuse a model that is no folder and no hub id, or cannot be a flow map, before anything heavy is imported.

    Args:
        model: as given.
        option: what it was given by.

    Raises:
        UserError: it is refused.
    """
    if not Path(model).expanduser().is_dir() and not is_hub_id(model):
        raise UserError(f"{option} {model}: there is no such folder, and it is no hub id (owner/name): check the path")
    check_network(str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model)


def load_model(model: str, precision: str = "") -> tuple[Codec, FlowMapBackbone, float]:
    """Codec, network and the shift of its schedule, on the GPU if there is one.

    The autoencoder is in float32, as where it encodes what is trained on.

    Args:
        model: folder or hub id.
        precision: of the network, ``float32`` or ``bfloat16``, instead of :func:`usual_precision`.

    Raises:
        UserError: the folder or hub name holds no such model.
    """
    import torch

    from anyflow.backbone.codec import Codec
    from anyflow.backbone.files import check_start
    from anyflow.backbone.kernels import prefer_kernel
    from anyflow.backbone.load import load_backbone
    from anyflow.system.console import quiet_libraries

    quiet_libraries()
    prefer_kernel("auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: torch.dtype = getattr(torch, precision or usual_precision(model))
    check_start(model)  # before the codec, whose text encoder is large
    codec = Codec.from_folder(model, text_dtype=dtype, device=device)
    backbone = load_backbone(model, dtype=dtype, device=device)
    backbone.requires_grad_(False)
    return codec, backbone, shift_of(model)


def shift_of(model: str) -> float:
    """The shift of a model's schedule: as its folder says; of plain Wan as its recipe says, which trains with it."""
    from anyflow.backbone.load import is_wan, read_shift

    recipe = recipe_of(model) if is_wan(model) else None
    return read_shift(model) if recipe is None else recipe.model.shift


def way_of(
    model: str,
    sampler: str | None = None,
    scale: float | None = None,
    negative: str | None = None,
    control: float | None = None,
) -> tuple[SamplerKind, Guidance]:
    """How a model is sampled: as the user says, else as usual; what is odd is reported on stderr.

    Usually a network is guided if its weights have no guidance (:func:`has_guidance`): as its export says, else as
    its recipe does (:attr:`~anyflow.recipe.Recipe.teacher_guidance`); plain Wan that no recipe knows, as recipes do
    where they say nothing.

    Args:
        model: folder or hub id.
        sampler: how jumps are taken.
        scale: of the guidance.
        negative: the negative prompt.
        control: scale of the guidance by controls; else that of the recipe beside the weights.

    Raises:
        UserError: the folder holds no such model, or a negative prompt or controls are to guide that nothing asks for.
    """
    from anyflow.backbone.guidance import Guidance
    from anyflow.backbone.load import is_wan, read_controls, read_guidance, read_sampler

    found, recipe, fused = read_guidance(model), recipe_of(model), has_guidance(model)
    if found is None:
        known = recipe or (Recipe() if is_wan(model) else None)
        usual = known.teacher_guidance if known is not None and not fused else 1.0
        found = Guidance(usual, recipe.model.negative_prompt if recipe is not None else "")
    is_told = read_controls(model) is not None
    if control not in (None, 1) and not is_told:
        raise UserError(f"--control-guidance {control:g}: {model} is told no controls: leave it out")
    usual = recipe.sampling.control_guidance_scale if recipe is not None and is_told else 1.0
    guidance = Guidance(
        found.scale if scale is None else scale,
        found.negative if negative is None else negative,
        usual if control is None else control,
    )
    if scale not in (None, 1) and fused and os.environ.get("RANK", "0") == "0":
        print(f"{model} has guidance in its weights: --guidance {scale:g} guides it twice", file=sys.stderr)
    if negative is not None and guidance.scale == 1:
        raise UserError(
            f"--negative {negative!r}: nothing asks for it, {model} is sampled without guidance: give --guidance with "
            "it, or leave it out"
        )
    return sampler or read_sampler(model), guidance  # type: ignore[return-value]


def has_guidance(model: str) -> bool:
    """Whether guidance is in a model's weights: in those of all but plain flow matching (a teacher, plain Wan)."""
    from anyflow.backbone.load import read_sampler

    return SAMPLERS[read_sampler(model)].fuses_guidance


def usual_precision(model: str) -> str:
    """What a model's network is sampled in: ``float32`` on the CPU, on a GPU as its recipe says, else ``bfloat16``.

    Weights that are never trained lose nothing more by lying in the precision that they are computed in.
    """
    import torch

    if not torch.cuda.is_available():
        return "float32"
    recipe = recipe_of(model)
    return "float32" if recipe is not None and recipe.hardware.precision == "32-true" else "bfloat16"


def native_shape(
    model: str,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
) -> ClipShape:
    """The clip shape that a model was trained on, with what the user asks for instead; fps None is each clip's own.

    Raises:
        UserError: the model does not say (:func:`trained_shape`) and the user did not say all of it, or the model makes
            no clips of that size.
    """
    from anyflow.data.decode import ClipShape

    known = trained_shape(model)
    if known is None and None in (frames, height, width):
        folder = Path(model).expanduser()
        if folder.is_dir() and not any((folder / name).exists() for name in MODEL):
            raise UserError(f"--model {model} is no model: it has no {MODEL[0]}; give a model's or a run's folder")
        raise UserError(
            f"--model {model} does not say its clip size: give --frames, --height and --width where the command takes "
            "them, else a file in recipes/models that names this model"
        )
    usual = known or (0, 0, 0, 0.0)
    shape = ClipShape(frames or usual[0], height or usual[1], width or usual[2], fps or usual[3] or None)
    layout_of(model).check(shape.frames, shape.height, shape.width)
    return shape


Shape = tuple[int, int, int, float]
"""Frames, height, width, frames a second (0: each clip's own)."""


def trained_shape(model: str) -> Shape | None:
    """The clip shape that a model was trained on, if its recipe (:func:`recipe_of`) or README (an export) says it."""
    recipe = recipe_of(model)
    if recipe is None:
        return _from_readme(Path(model))
    return recipe.data.frames, recipe.data.height, recipe.data.width, recipe.data.fps


def recipe_of(model: str) -> Recipe | None:
    """The recipe that a model is trained by, if there is one.

    It lies beside the weights (a run), or a model file of the recipes names these weights (a published model): then
    with the hardware that this file asks for.
    """
    for folder in (Path(model), Path(model).parent):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(str(folder / "recipe.yaml"))
    for name in list_recipes().get("models", []):
        recipe = load_recipe("finetune/driving", model=name)
        if _is_same(recipe.model.weights, model):
            return recipe
    return None


def _is_same(weights: str, model: str) -> bool:
    """The same folder, however it is written, or the same hub id."""
    return weights == model.rstrip("/") or (Path(model).is_dir() and Path(weights).resolve() == Path(model).resolve())


def _from_readme(folder: Path) -> Shape | None:
    """From the usage lines of a model card that this project wrote."""
    from anyflow.backbone.model_card import OWN_RATES

    path = folder / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    size = re.search(r"num_frames=(\d+), height=(\d+), width=(\d+)", text)
    fps = re.search(r"fps=([\d.]+)", text)
    if size is None or fps is None:
        return None
    return int(size[1]), int(size[2]), int(size[3]), 0.0 if OWN_RATES in text else float(fps[1].rstrip("."))
