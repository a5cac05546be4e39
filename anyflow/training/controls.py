"""The controls of a run: those of its cards that the recipe names."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow.backbone.controls import ControlSettings
from anyflow.backbone.roles import Roles
from anyflow.data.controls import with_domain
from anyflow.data.reader import find_split
from anyflow.data.wanted import wanted_controls
from anyflow.errors import UserError
from anyflow.recipe import Recipe

FIELD = "model.control.names"


def check_told(recipe: Recipe, told: ControlSettings | None) -> None:
    """That samples are guided by controls where the network is told some.

    Raises:
        UserError: it is told none.
    """
    scale = recipe.sampling.control_guidance_scale
    if scale != 1 and told is None:
        raise UserError(
            f"sampling.control_guidance_scale={scale:g}: this network is told no controls: name some in {FIELD}, or "
            "leave it out"
        )


def check_teacher(recipe: Recipe, told: ControlSettings | None, roles: Roles | None) -> str:
    """A warning where the student is told controls and its teacher is not; empty: there is nothing to say.

    Such a teacher judges whether samples look real, and not whether they obey. That asks no wrong thing of them, as
    long as the critic is told as little, but it teaches no controls.

    Raises:
        UserError: nothing else would teach them.
    """
    if told is None or roles is None or roles.teacher_is_told:
        return ""
    teacher = recipe.stage.onpolicy.teacher or recipe.model.weights
    obeys = "train a teacher that is told them (stage teacher, with the same model.control.names)"
    if recipe.sampler != "flowmap" or recipe.stage.onpolicy.forward_weight == 0:
        raise UserError(
            f"the teacher {teacher} is told no controls, and in stage {recipe.stage.name} nothing else teaches the "
            f"student to obey them: {obeys}, or set stage.name=onpolicy and stage.onpolicy.forward_weight=1"
        )
    return (
        f"warning: the teacher {teacher} is told no controls, and so is the critic: they judge whether samples look "
        f"real and not whether they obey, which the loss on data alone teaches; to judge both, {obeys}"
    )


def lacking_controls(recipe: Recipe, told: ControlSettings | None) -> Iterator[str]:
    """A sentence for each card whose clips lack what the network is told; another domain's controls are not theirs."""
    if told is None:
        return
    splits = {card: find_split(card, recipe.data.split, index=False) for card in recipe.data.card}
    domains = {found.domain for found in splits.values()}
    for card, found in splits.items():
        has = with_domain(found.domain, found.controls)
        lacks = [name for name in told.controls if name not in has]
        own = [name for name in lacks if name.partition(".")[0] not in domains - {found.domain}]
        if lacked := (lacks if len(lacks) == len(told.controls) else own):
            known = ", ".join(found.controls) or "no controls"
            yield f"note: {card} has no {' and no '.join(lacked)} (its card has {known}): its clips train without"


def _covers(learnt: ControlSettings, recipe: Recipe) -> bool:
    """Whether a recipe's controls are learnt, as such or as ``DOMAIN.NAME`` of every card, and a card has one."""
    names = recipe.model.control.names
    splits = [find_split(card, recipe.data.split, index=False, require_shards=False) for card in recipe.data.card]
    return any(name in with_domain(found.domain, found.controls) for found in splits for name in names) and all(
        name in learnt.controls or all(f"{found.domain}.{name}" in learnt.controls for found in splits)
        for name in names
    )


def asked_controls(recipe: Recipe, pixel_frames: int, learnt: ControlSettings | None = None) -> ControlSettings | None:
    """What the recipe's network shall be told; None: nothing, or what it has learnt.

    Args:
        recipe: names the controls, and the cards that describe them.
        pixel_frames: that a latent frame covers.
        learnt: what the network that it starts from is told already.

    Raises:
        UserError: no card has such a control, its range is not known, or two cards describe it differently.
    """
    names, cards = recipe.model.control.names, recipe.data.card
    if not names or (learnt is not None and _covers(learnt, recipe)):
        return None
    found = wanted_controls(cards, names, recipe.data.split, FIELD)
    for name, control in found.items():
        if control.kind == "continuous" and not control.low:
            raise UserError(f"{FIELD}: the range of {name!r} is not known: anyflow data controls {cards[0]} finds it")
    described = {name: control.to_dict() for name, control in found.items()}
    return ControlSettings(described, recipe.model.control.width, pixel_frames)
