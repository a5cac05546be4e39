"""Rules between a recipe's fields that belong to single stages; each takes a recipe, whose room is above this one."""

from __future__ import annotations

from typing import Any

from anyflow.errors import UserError


def check_frames(key: str, frames: int) -> None:
    """That a number of frames is one that the VAE takes.

    Raises:
        UserError: it is not.
    """
    if frames % 4 != 1:
        below = max(1, frames - (frames - 1) % 4)
        raise UserError(f"{key}={frames} is not 4n+1, as the VAE needs: give {below} or {below + 4}")


def nearest(size: int, step: int) -> str:
    """The multiples of ``step`` around a size, in words."""
    below = size // step * step
    return f"{below} or {below + step}" if below else str(step)


def codec_begins_anew(recipe: Any) -> None:
    """The codec stage takes a new model, and trains all of its weights on pixels."""
    model = recipe.model
    if model.init != "new" or model.lora.enabled:
        raise UserError(
            f"stage.name='codec' trains a small VAE from nothing, which model {model.name!r} does not take: "
            "choose model tiny and set model.init=new"
        )
    if recipe.data.precompute:
        raise UserError("data.precompute=true leaves the codec stage without pixels: set data.precompute=false")


def crops_fit(recipe: Any) -> None:
    """The codec stage's crops fit on its grid and into every shape of clip."""
    codec = recipe.stage.codec
    check_frames("stage.codec.crop_frames", codec.crop_frames)
    frames, height, width = (min(sides) for sides in zip(*recipe.data.shapes, strict=True))
    crops = (
        ("frames", codec.crop_frames, frames),
        ("height", codec.crop_height, height),
        ("width", codec.crop_width, width),
    )
    for name, crop, whole in crops:
        if name != "frames" and crop % 8:
            raise UserError(f"stage.codec.crop_{name}={crop} is no multiple of 8: give {nearest(crop, 8)}")
        if crop > whole:
            raise UserError(f"stage.codec.crop_{name}={crop} exceeds data.{name}={whole}: give at most {whole}")


def budgets_are_given(recipe: Any) -> None:
    """A rollout needs a number of steps."""
    if not recipe.stage.onpolicy.budgets:
        raise UserError("stage.onpolicy.budgets is empty: give the step counts to simulate, for example [1, 2, 4, 8]")


def teacher_is_named(recipe: Any) -> None:
    """On-policy distillation takes its teacher from the frozen base under adapters, or from a folder."""
    if not recipe.model.lora.enabled and not recipe.stage.onpolicy.teacher:
        raise UserError(
            "stage.onpolicy.teacher is empty: without LoRA there is no frozen base to teach, "
            "so name the folder of a flow-matching model of the same data (the teacher stage's run)"
        )


def tail_has_a_teacher(recipe: Any) -> None:
    """An on-policy tail's teacher is made from an any-step base, in some steps."""
    if not recipe.stage.tail.teacher_steps:
        raise UserError(
            "stage.tail.teacher_steps=0 leaves the base itself as the teacher, which knows nothing of this domain and "
            "would pull the model back to the old one: give a few hundred steps, or stage.tail.steps=0 for no tail"
        )
    if recipe.model.lora.start:
        raise UserError(
            f"model.lora.start={recipe.model.lora.start!r} leaves an on-policy tail without an any-step base to make "
            "its teacher from: name the merged model (that run's folder 'model') in model.weights instead"
        )
