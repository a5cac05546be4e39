"""Everything about a recipe that can be wrong before weights or data are opened, each reported in one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from pathlib import Path
from typing import Any

from anyflow.backbone.layout import Layout, check_heads, check_network, heads_of, layout_of
from anyflow.data.find import find_card
from anyflow.errors import UserError
from anyflow.recipe.fields import FieldInfo, all_fields, value_of
from anyflow.recipe.schema import Recipe
from anyflow.stages.checks import check_frames, nearest
from anyflow.system.addresses import check_secret, check_store

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_SHAPE = re.compile(r"\d{1,5}x\d{1,5}x\d{1,5}")


def check_recipe(recipe: Recipe) -> None:
    """Ranges of all fields, then the rules between them.

    Raises:
        UserError: the first field at fault, its value, and what to give instead.
    """
    if recipe.run.tracking_uri:
        check_store(recipe.run.tracking_uri, "run.tracking_uri", is_there=False)
    for key, info in all_fields().items():
        check_range(info, value_of(recipe, key), recipe.sources.get(key, "default"))
    _check_names(recipe)
    _check_network(recipe)
    _check_geometry(recipe)
    _check_adapters(recipe)
    for check in recipe.declared.checks:
        check(recipe)
    _check_start(recipe)
    _check_objective(recipe)
    _check_guidance(recipe)
    _check_hardware(recipe)


def check_files(recipe: Recipe) -> None:
    """That the dataset cards and the folders of weights that the recipe names exist (hub ids are not looked up).

    Raises:
        UserError: the first one that does not, and where to get it.
    """
    if not recipe.data.card:
        raise UserError(
            "data.card is empty: name a dataset card, for example data.card=driving or data.card=path/to/card.yaml"
        )
    for card in recipe.data.card:
        if "://" not in card:  # one elsewhere is looked for when it is read
            find_card(card)
    needed = [("model.codec", recipe.model.codec)]
    if recipe.model.init == "weights":
        needed.append(("model.weights", recipe.model.weights))
    if recipe.model.lora.enabled:
        needed.append(("model.lora.start", recipe.model.lora.start))
    needed += [(key, value_of(recipe, key)) for key in recipe.declared.folders]
    for key, place in needed:
        is_adapter = recipe.model.lora.enabled and key in ("model.lora.start", *recipe.declared.folders)
        if place and not Path(place).exists() and (is_adapter or not is_hub_id(place)):
            kinds = (
                "a run or a folder with an adapter" if is_adapter else "a folder of weights or a hub id (owner/name)"
            )
            near = _numbered_run(Path(place))
            hint = f"did you mean {near}?" if near else "or run the recipe that makes it first"
            raise UserError(f"{key}={place!r} does not exist: give {kinds}, {hint}")


def _numbered_run(place: Path) -> Path | None:
    """The newest run that was numbered by itself (``runs/NAME-003``) where a recipe looks for ``runs/NAME``."""
    missing = [path for path in (place, *place.parents) if not path.exists()][-1]
    runs = sorted(path for path in missing.parent.glob(f"{missing.name}-[0-9][0-9][0-9]") if path.is_dir())
    return runs[-1] / place.relative_to(missing) if runs else None


def is_hub_id(text: str) -> bool:
    """Whether a text can be a model of the hub: ``owner/name`` or ``owner/name@revision``, the owner no folder here."""
    return bool(_HUB_ID.fullmatch(text)) and not Path(text.partition("/")[0]).is_dir()


def fit_batch(recipe: Recipe) -> Recipe:
    """``batch_size`` and ``accumulate`` that make ``data.global_batch``: the largest pass that fits, repeated.

    Raises:
        UserError: the ranks do not divide the batch, or outnumber it.
    """
    total, ranks = recipe.data.global_batch, recipe.data_ranks
    if not total:
        return recipe
    if total % ranks:
        near = max(1, round(total / ranks)) * ranks
        kind, context = ("ranks", "") if ranks == recipe.world_size else ("groups of ranks", " or hardware.context")
        raise UserError(
            f"data.global_batch={total} does not divide over {ranks} {kind}: "
            f"give data.global_batch={near}, or other hardware.devices{context}"
        )
    share = total // ranks
    batch = max(size for size in range(1, min(share, recipe.data.batch_size) + 1) if share % size == 0)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, batch_size=batch),
        hardware=dataclasses.replace(recipe.hardware, accumulate=share // batch),
    )


def check_range(info: FieldInfo, value: Any, source: str) -> None:
    """That a field's value, or each of a list's, is within its limits; ``source`` says who set it.

    Raises:
        UserError: it is not.
    """
    where = f"{info.key}={value!r} ({source})"
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            check_secret(item, info.key)
        if "choices" in info.limits and item not in info.limits["choices"]:
            close = difflib.get_close_matches(str(item), map(str, info.limits["choices"]), n=1)
            raise UserError(
                f"{where} is not known: give {info.wants}" + (f" (did you mean {close[0]}?)" if close else "")
            )
        if isinstance(item, bool) or not isinstance(item, int | float):
            continue
        if not math.isfinite(item):
            raise UserError(f"{where} is not finite: give {info.wants}")
        if "low" in info.limits and item < info.limits["low"]:
            raise UserError(f"{where} is too small: give at least {info.limits['low']}")
        if "above" in info.limits and item <= info.limits["above"]:
            raise UserError(f"{where} is too small: give more than {info.limits['above']}")
        if "high" in info.limits and item > info.limits["high"]:
            raise UserError(f"{where} is too large: give at most {info.limits['high']}")


def _check_names(recipe: Recipe) -> None:
    if recipe.run.name and not _NAME.fullmatch(recipe.run.name):
        raise UserError(
            f"run.name={recipe.run.name!r} cannot be a folder's name: use letters, digits, dot, dash and underscore"
        )
    steps = recipe.sampling.steps
    if not steps or len(set(steps)) != len(steps):
        raise UserError(f"sampling.steps={steps} is empty or repeats itself: give each number once, for example [1, 4]")
    if recipe.data.split == recipe.data.heldout:
        raise UserError(
            f"data.heldout={recipe.data.heldout!r} is the training split: "
            "name another one, so that quality is measured on unseen clips"
        )
    for key in ("optimizer.betas", "stage.onpolicy.critic.betas", "stage.tail.optimizer.betas"):
        if len(value_of(recipe, key)) != 2:
            raise UserError(f"{key}={value_of(recipe, key)} is no pair: give two numbers, for example [0.9, 0.95]")


def _check_network(recipe: Recipe) -> None:
    """That what is trained can be a flow map, and what teaches it too, of the same latents, as far as is known yet."""
    model = recipe.model
    if model.init == "weights" and model.weights:
        check_network(model.weights)
    for key in () if model.lora.enabled else recipe.declared.folders:
        if teacher := value_of(recipe, key):
            check_network(teacher)
            layout_of(teacher, model.codec or model.weights, key)


def _check_geometry(recipe: Recipe) -> None:
    data, layout = recipe.data, layout_of_recipe(recipe)
    if data.weights and len(data.weights) != len(data.card):
        raise UserError(
            f"data.weights has {len(data.weights)} values for {len(data.card)} cards: give one for each of data.card"
        )
    _check_streaming(recipe)
    check_frames("data.frames", data.frames)
    latent_frames = layout.latents(*data.shapes[0])[0]
    if recipe.sampling.given_frames >= latent_frames:
        raise UserError(
            f"sampling.given_frames={recipe.sampling.given_frames} leaves nothing to sample of the {latent_frames} "
            f"latent frames of data.frames={data.frames}: give at most {latent_frames - 1}"
        )
    _check_buckets(recipe, layout)
    least, multiple = 4 * layout.spatial, layout.multiple
    for number, (_, height, width) in enumerate(data.shapes):
        where = f"data.buckets={data.buckets[number - 1]}: " if number else ""
        for key, size in (("data.height", height), ("data.width", width)):
            if size % multiple or not size:
                near = nearest(size, multiple)
                raise UserError(f"{where}{key}={size} is no multiple of {multiple} (VAE x patch): give {near}")
        if recipe.model.architecture == "causal" and min(height, width) < least:
            raise UserError(
                f"{where}data.height={height} and data.width={width} are too small for a causal network: it makes "
                f"tokens of 4 x 4 latents: give at least {least} pixels a side"
            )


def _check_streaming(recipe: Recipe) -> None:
    """What needs to know every clip beforehand cannot be had of tars that are read as they come."""
    data = recipe.data
    for field, given in (("precompute", data.precompute), ("buckets", data.buckets), ("weights", data.weights)):
        if data.streaming and given:
            raise UserError(
                f"data.{field}={given} needs an index of the clips, and data.streaming=true makes none: leave out one"
            )


def layout_of_recipe(recipe: Recipe) -> Layout:
    """How the recipe's model makes latents and tokens of clips.

    Raises:
        UserError: its network and its codec do not go together.
    """
    model = recipe.model
    return layout_of(model.weights if model.init == "weights" else "", model.codec)


def _check_buckets(recipe: Recipe, layout: Layout) -> None:
    data = recipe.data
    for bucket in data.buckets:
        parse_shape(bucket, "data.buckets")
    seen: set[tuple[int, int, int]] = set()
    budget = data.batch_size * layout.tokens(*data.shapes[0])
    for bucket, shape in zip(["data.frames x height x width", *data.buckets], data.shapes, strict=True):
        if shape in seen:
            raise UserError(f"data.buckets={data.buckets} names {bucket} twice, or the run's own shape: give it once")
        seen.add(shape)
        if shape == data.shapes[0]:
            continue
        check_frames(f"data.buckets={bucket}: frames", shape[0])
        if (tokens := layout.tokens(*shape)) > budget:
            raise UserError(
                f"data.buckets={bucket}: a clip has {tokens} tokens, more than a pass of data.batch_size="
                f"{data.batch_size} clips of the run's own shape ({budget}): raise data.batch_size, or make the "
                "largest shape data.frames x height x width"
            )


def parse_shape(text: str, field: str) -> tuple[int, int, int]:
    """``81x480x832`` as (frames, height, width).

    Raises:
        UserError: it is no such text; ``field`` is where it stands.
    """
    if not _SHAPE.fullmatch(text):
        raise UserError(f"{field}: {text!r} is no shape: write frames x height x width, for example 81x480x832")
    frames, height, width = (int(side) for side in text.split("x"))
    return frames, height, width


def _check_objective(recipe: Recipe) -> None:
    stage = recipe.stage
    total = stage.diffusion_share + stage.consistency_share
    if total > 1 + 1e-9:
        raise UserError(
            f"stage.diffusion_share={stage.diffusion_share} and stage.consistency_share={stage.consistency_share} "
            f"sum to {total:g}, above 1: lower one of them"
        )


def _check_guidance(recipe: Recipe) -> None:
    scale, source = recipe.sampling.guidance_scale, recipe.sources.get("sampling.guidance_scale")
    if 0 < scale < 1:
        raise UserError(f"sampling.guidance_scale={scale} is below 1: give 1 for none, more, or 0 for the stage's")
    if scale > 1 and source == "command line" and recipe.fuses_guidance:
        raise UserError(
            f"sampling.guidance_scale={scale} is for weights without guidance, and stage {recipe.stage.name} trains "
            "guidance into them: leave it out, and set stage.guidance_scale"
        )


def lagging_average(recipe: Recipe) -> str:
    """A warning if the average of the weights, which is what a run exports, cannot follow them; empty if it can.

    ``1 / (1 - decay)`` updates are averaged, roughly. Where these are more than two fifths of all that there are, the
    average still holds much of weights that had learnt little.
    """
    decay, stage = recipe.ema.decay, recipe.stage
    updates = max(0, stage.steps - recipe.ema.start_step)
    steps = f"stage.steps={stage.steps}"
    if recipe.has_tail and stage.tail.steps < updates:
        updates, steps = stage.tail.steps, f"stage.tail.steps={stage.tail.steps}"
    if stage.steps <= recipe.ema.start_step or not decay or updates * (1 - decay) >= 2.5:
        return ""
    fitting = max(0.0, 1 - 6 / max(updates, 1))
    return (
        f"warning: ema.decay={decay:g} averages about {1 / (1 - decay):,.0f} updates, and {steps} with "
        f"ema.start_step={recipe.ema.start_step} makes {updates}: the average, which is exported, lags behind what is "
        f"learnt; ema.decay={fitting:.2g} follows"
    )


def fit_strategy(recipe: Recipe) -> Recipe:
    """``ddp`` in place of a hardware file's ``fsdp`` where weights must stay whole: muon, a quantised base, the codec.

    Raises:
        UserError: the command line or the stage file asks for ``fsdp`` itself.
    """
    hardware = recipe.hardware
    whole = f"stage.name={recipe.stage.name}" if recipe.declared.trains_codec else recipe.whole_weights
    if hardware.strategy != "fsdp" or not whole:
        return recipe
    field = recipe.whole_weights.partition("=")[0]
    other = "" if recipe.declared.trains_codec else f", or {field}={'full' if field == 'model.lora.base' else 'adamw'}"
    if Path(recipe.sources.get("hardware.strategy", "")).parent.name != "hardware":
        raise UserError(
            f"hardware.strategy=fsdp spreads weights over ranks and {whole} needs them whole: "
            f"set hardware.strategy=ddp{other}"
        )
    fitted = dataclasses.replace(recipe, hardware=dataclasses.replace(hardware, strategy="ddp"))
    _check_hardware(fitted)  # options of fsdp would be passed over
    return fitted


def _check_hardware(recipe: Recipe) -> None:
    hardware = recipe.hardware
    if hardware.strategy != "fsdp" and (hardware.offload or hardware.shard_within == "node"):
        field = "offload=true" if hardware.offload else "shard_within='node'"
        raise UserError(f"hardware.{field} is an option of fsdp: set hardware.strategy=fsdp with it")
    if hardware.precision == "bf16-true" and (not recipe.model.lora.enabled or recipe.declared.trains_codec):
        raise UserError(
            "hardware.precision='bf16-true' would train weights in bfloat16, which swallows small updates: set "
            "hardware.precision=bf16-mixed, or train float32 adapters on a frozen base (model.lora.enabled=true)"
        )
    if hardware.attention == "flex" and recipe.model.architecture != "causal":
        raise UserError(
            f"hardware.attention=flex is for the masks of causal networks, and model.architecture is "
            f"{recipe.model.architecture}: set hardware.attention=auto"
        )
    _check_context(recipe)


def _check_context(recipe: Recipe) -> None:
    """That ranks of one node can share clips, and that there are clips' tokens and whole heads to share."""
    size, devices = recipe.hardware.context, recipe.hardware.devices
    if size > 1 and recipe.declared.trains_codec:
        raise UserError(
            f"hardware.context={size} spreads the tokens of a network, and stage {recipe.stage.name} trains "
            "an autoencoder, which has none: set hardware.context=1"
        )
    if devices % size:
        fitting = max(number for number in (1, 2, 4, 8) if devices % number == 0)
        raise UserError(
            f"hardware.context={size} does not divide hardware.devices={devices}, and ranks that share a clip are "
            f"of one node: set hardware.context={fitting}, or hardware.devices={-(-devices // size) * size}"
        )
    for model in (recipe.model.weights, recipe.stage.onpolicy.teacher if recipe.has_teacher else ""):
        if size > 1 and model and (heads := heads_of(model)) is not None:
            check_heads(size, heads)


def _check_adapters(recipe: Recipe) -> None:
    model = recipe.model
    if model.lora.dropout > 0:
        raise UserError(
            f"model.lora.dropout={model.lora.dropout} would corrupt the finite difference of the target: set it to 0"
        )
    if model.lora.start and not model.lora.enabled:
        raise UserError(
            f"model.lora.start={model.lora.start!r} is an adapter, and model.lora.enabled=false trains every weight: "
            "name that run in model.weights, and set model.lora.start= (empty)"
        )
    if model.lora.base != "full" and not model.lora.enabled:
        raise UserError(
            f"model.lora.base={model.lora.base} rounds a frozen network, and model.lora.enabled=false trains every "
            "weight: set model.lora.enabled=true, or model.lora.base=full"
        )
    if model.lora.full != ["released"] and not model.lora.enabled:
        raise UserError(f"model.lora.full={model.lora.full} needs model.lora.enabled=true: set that, or leave it out")
    if model.lora.enabled and not model.lora.targets:
        raise UserError(
            "model.lora.targets is empty: name the layers that carry an adapter, or set model.lora.enabled=false"
        )


def _check_start(recipe: Recipe) -> None:
    """The model that training begins with."""
    model, stage = recipe.model, recipe.declared
    if stage.trains_codec:
        return
    if model.init == "weights" and not model.weights:
        raise UserError("model.weights is empty: give a folder or a hub id (owner/name), or model.init=new")
    if model.init == "new":
        if not model.codec:
            raise UserError("model.init='new' leaves no VAE and text encoder: name their folder in model.codec")
        if model.lora.enabled:
            raise UserError("model.lora.enabled=true on a new network would train adapters on noise: set it to false")
        if stage.starts_from:
            raise UserError(
                f"stage {stage.name} starts from {stage.starts_from}, and model.init='new' has none: "
                "set model.init=weights"
            )
