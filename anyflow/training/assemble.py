"""From a recipe to the objects that it names: codec, backbone, stage, data. Each gets plain arguments.

Nothing here trains; ``--dry-run`` builds all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from anyflow.backbone.codec import Codec, codec_dtypes
from anyflow.backbone.compiled import compile_blocks
from anyflow.backbone.context import Context, join_context
from anyflow.backbone.controls import MODULE as CONTROLS
from anyflow.backbone.controls import ControlSettings, check_controls, controls_of
from anyflow.backbone.embedded import build_text_encoder, build_tokenizer, build_vae, transformer_config
from anyflow.backbone.files import check_start
from anyflow.backbone.full import RELEASED_FULL, add_full
from anyflow.backbone.kernels import prefer_kernel
from anyflow.backbone.layout import check_channels, check_heads, heads_of
from anyflow.backbone.load import keep_in, load_backbone, new_backbone, read_controls
from anyflow.backbone.lora import ADAPTER, LoraSettings, add_lora, load_lora
from anyflow.backbone.parallelize import (
    WAIT,
    ParallelSettings,
    accelerator_here,
    checkpoint_activations,
    join_ranks,
    parallelize,
    rank_and_size,
    rank_zero_first,
)
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.quantized import quantize_base
from anyflow.backbone.roles import AdapterRoles, Roles, SeparateRoles
from anyflow.data.cache import TextStore
from anyflow.data.encode import Encoding, estimate
from anyflow.data.module import VideoDataModule
from anyflow.data.reader import ShardReader, find_split
from anyflow.data.wanted import learnt_controls
from anyflow.errors import UserError
from anyflow.recipe import Recipe
from anyflow.stages.base import Stage, Training
from anyflow.stages.parts import StageParts
from anyflow.system.console import progress_line
from anyflow.system.option import part_of
from anyflow.training.controls import asked_controls, check_teacher, check_told, lacking_controls
from anyflow.training.encoding import EncodingJob
from anyflow.training.idle import idle_options


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    codec: Codec
    backbone: FlowMapBackbone
    stage: Stage
    data: VideoDataModule
    notes: tuple[str, ...] = ()
    """What is to be said before it starts."""


def assemble(recipe: Recipe, *, leave_stored: bool = False, encode: bool = True) -> Parts:
    """Build everything that the recipe names.

    Args:
        recipe: what to build.
        leave_stored: the networks' weights stay in their files.
        encode: encode the data beforehand if the recipe asks for it and it was not done; else pixels stand in.

    Raises:
        UserError: A checkpoint, card or clip does not fit the recipe.
    """
    comes_in_parts = is_sharded(recipe) or recipe.model.lora.base != "full"
    codec, backbone = load_networks(recipe, leave_stored=leave_stored or comes_in_parts)
    told = controls_of(backbone.transformer)
    check_told(recipe, told)
    stage = build_stage(recipe, codec, backbone)
    notes = [check_teacher(recipe, told, stage.roles), *lacking_controls(recipe, told), *idle_options(recipe)]
    return Parts(codec, backbone, stage, build_data(recipe, codec, told, encode=encode), tuple(filter(None, notes)))


def load_networks(recipe: Recipe, *, leave_stored: bool = False) -> tuple[Codec, FlowMapBackbone]:
    """Codec and network, the adapter of a LoRA run on it."""
    codec, backbone = load_model(recipe, leave_stored=leave_stored)
    if not recipe.declared.trains_codec:
        shape = codec.latent_shape(recipe.data.frames, recipe.data.height, recipe.data.width)
        backbone.fit_clip(shape[0])
    if recipe.model.lora.enabled and not recipe.declared.trains_codec:
        if recipe.model.lora.start:
            load_lora(backbone, recipe.model.lora.start)
            # what this recipe trains in full and the run before did not, as a network that has become causal
            add_full(backbone.transformer, lora_settings(recipe, backbone).full, ADAPTER)
        else:
            add_lora(backbone, lora_settings(recipe, backbone))
    return codec, backbone


def load_model(recipe: Recipe, *, leave_stored: bool = False) -> tuple[Codec, FlowMapBackbone]:
    """Codec and network, loaded or, for the first stages of an embedded model, built new."""
    model, hardware = recipe.model, recipe.hardware
    if accelerator_here(hardware.accelerator) == "gpu":
        prefer_kernel(hardware.attention)
    dtype = weights_dtype(recipe)
    if model.init == "weights":
        found = check_start(model.weights)  # before the codec, whose text encoder is large
        check_heads(hardware.context, heads_of(str(found)) or hardware.context)
    if recipe.declared.trains_codec:
        tokenizer = build_tokenizer(captions(recipe))
        codec = Codec(
            build_vae(recipe.run.seed), tokenizer, build_text_encoder(len(tokenizer), recipe.run.seed), source=None
        )
    else:
        codec_dtype, text_dtype = codec_dtypes(hardware.precision)
        folder, stored = model.codec or model.weights, is_precomputed(recipe)
        codec = Codec.from_folder(folder, dtype=codec_dtype, text_dtype=text_dtype, stored=stored)
        codec.is_parked = stored or hardware.park_codec
    learnt = read_controls(found) if model.init == "weights" else None
    controls = asked_controls(recipe, codec.temporal_factor, learnt)
    if model.init == "new":
        network = {**transformer_config(codec.layout.channels), **model.network}
        backbone: FlowMapBackbone = new_backbone(network, recipe.run.seed, model.architecture, controls)
    else:
        backbone = load_backbone(
            model.weights,
            architecture=model.architecture,
            dtype=dtype,
            leave_stored=leave_stored,
            network=model.network,
            controls=controls,
        )
    check_heads(hardware.context, backbone.transformer.config.num_attention_heads)
    check_channels(backbone.transformer.config.in_channels, codec.layout, model.weights, model.codec)
    if hardware.gradient_checkpointing:
        checkpoint_activations(backbone, hardware.keep_attention)
    return codec, backbone


def is_sharded(recipe: Recipe) -> bool:
    """Whether the weights are spread over ranks."""
    return recipe.hardware.strategy == "fsdp" and rank_and_size()[1] > 1


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """Precision that the network's weights are kept in: float32 if they are trained, by default."""
    hardware = recipe.hardware
    frozen_base = hardware.strategy == "fsdp" and recipe.model.lora.enabled and hardware.precision == "bf16-mixed"
    return torch.bfloat16 if frozen_base or hardware.precision == "bf16-true" else torch.float32


def frozen_dtype(recipe: Recipe) -> torch.dtype:
    """Precision that a network is kept in which is never trained: the one that it computes in."""
    return torch.bfloat16 if recipe.hardware.precision.startswith("bf16") else torch.float32


def parallel_settings(recipe: Recipe, *, compiled: bool = True) -> ParallelSettings:
    """How the recipe's hardware spreads a network; ``compiled`` False leaves compiling out."""
    hardware = recipe.hardware
    return ParallelSettings(
        compute=torch.bfloat16 if hardware.precision.startswith("bf16") else None,
        compile=hardware.compile and compiled,
        offload=hardware.offload,
        residual=hardware.residual,
        nodes=hardware.num_nodes if hardware.shard_within == "node" else 1,
    )


def spread(recipe: Recipe, context: Context, *networks: FlowMapBackbone) -> None:
    """Compile, quantise, spread over the ranks, as the recipe says; the last step before a stage is built."""
    hardware, settings = recipe.hardware, parallel_settings(recipe)
    for network in networks:
        network.context = context
        if hardware.attention == "flex" and network.is_causal and accelerator_here(hardware.accelerator) == "gpu":
            network.attention = "flex"
        if is_sharded(recipe):
            parallelize(network, settings, join_ranks(hardware.accelerator))
            continue
        network.residual = settings.residual
        if recipe.model.lora.base != "full":
            quantize_base(network, recipe.model.lora.base, join_ranks(hardware.accelerator))
        if hardware.precision != "32-true":  # in sampling too, where Lightning is not around it
            network.compute = torch.bfloat16
        if settings.compile:
            compile_blocks(network)


def build_stage(recipe: Recipe, codec: Codec, backbone: FlowMapBackbone) -> Stage:
    """The LightningModule of the recipe's stage."""
    roles = build_roles(recipe, backbone) if recipe.has_teacher else None
    context = join_context(recipe.hardware.context, WAIT)
    if not recipe.declared.trains_codec:
        spread(recipe, context, *(roles.networks if roles is not None else [backbone]))
    parts = StageParts(
        options=recipe.stage,
        training=Training(
            recipe.optimizer, recipe.ema, recipe.stage.steps, recipe.run.seed, recipe.hardware.accumulate, context
        ),
        codec=codec,
        backbone=backbone,
        roles=roles,
        shift=recipe.model.shift,
        negative_prompt=recipe.model.negative_prompt,
        control_drop=recipe.model.control.dropout,
        recompute_jumps=recipe.hardware.recompute_jumps,
    )
    return recipe.declared.load().build(parts)


def build_roles(recipe: Recipe, backbone: FlowMapBackbone) -> Roles:
    """Student, critic and teacher: adapters on the student's base, or networks of their own.

    Before an on-policy tail the teacher is the base, and is trained. Consistency distillation has no critic, and its
    teacher sees frames as the student does.
    """
    teacher = recipe.model.weights if recipe.has_tail else recipe.stage.onpolicy.teacher
    kind = roles_kind(recipe)
    if recipe.model.lora.enabled:
        if teacher and not recipe.has_tail:
            load_lora(backbone, teacher, adapter="teacher")
        settings, seed = lora_settings(recipe, backbone), recipe.run.seed
        hears = controls_of(backbone.transformer) is not None
        is_told = hears and read_controls(recipe.model.weights) is not None
        return AdapterRoles(backbone, settings, seed=seed, base_is_told=is_told, **kind)
    network = load_backbone(
        teacher or recipe.model.weights,
        # of either architecture where there is a critic: both see all frames at once
        architecture=None if recipe.has_critic else recipe.model.architecture,
        dtype=weights_dtype(recipe),
        leave_stored=backbone.stored is not None,
        controls=controls_of(backbone.transformer) if recipe.declared.trains_teacher else None,
    )
    if recipe.hardware.gradient_checkpointing:
        checkpoint_activations(network, recipe.hardware.keep_attention)
    _check_beside(recipe, network, backbone)
    told, asked = controls_of(network.transformer), controls_of(backbone.transformer)
    if told is not None and asked is not None:
        check_controls(told, asked, teacher or recipe.model.weights, "teacher and student are told the same")
    roles = SeparateRoles(backbone, network, **kind)
    if roles.frozen is not None:  # after the critic became its copy, in the precision that it is trained in
        keep_in(network, frozen_dtype(recipe))
    return roles


def _check_beside(recipe: Recipe, teacher: FlowMapBackbone, student: FlowMapBackbone) -> None:
    """That a teacher's network takes what the student's does, on as many ranks.

    Raises:
        UserError: it does not.
    """
    taught, own = teacher.transformer.config, student.transformer.config
    check_heads(recipe.hardware.context, taught.num_attention_heads)
    if taught.in_channels != own.in_channels:
        raise UserError(
            f"stage.onpolicy.teacher={recipe.stage.onpolicy.teacher!r} takes latents of {taught.in_channels} channels, "
            f"and model.weights={recipe.model.weights!r} of {own.in_channels}: name a teacher of the same latents"
        )


def roles_kind(recipe: Recipe) -> dict[str, Any]:
    """What the recipe's roles are asked for."""
    return {"trains_teacher": recipe.declared.trains_teacher, "has_critic": recipe.has_critic}


def lora_settings(recipe: Recipe, backbone: FlowMapBackbone | None = None) -> LoraSettings:
    """The shape of the recipe's adapters; what embeds a network's controls is trained in full beside them."""
    lora = recipe.model.lora
    released = RELEASED_FULL[recipe.model.architecture]
    full = [name for item in lora.full for name in (released if item == "released" else (item,))]
    if backbone is not None and controls_of(backbone.transformer) is not None and CONTROLS not in full:
        full.append(CONTROLS)
    return part_of(LoraSettings, lora, full=tuple(full))


def batches_of(recipe: Recipe) -> int:
    """Batches that the whole run asks of its data, on each rank."""
    onpolicy_steps = recipe.stage.tail.steps if recipe.has_tail else recipe.stage.steps if recipe.has_critic else 0
    critics = onpolicy_steps * recipe.stage.onpolicy.critic_turns
    return (recipe.total_steps + critics) * recipe.hardware.accumulate


def build_data(recipe: Recipe, codec: Codec, told: ControlSettings | None, *, encode: bool = True) -> VideoDataModule:
    """The training split as batches, of pixels or (``data.precompute``) of latents encoded beforehand.

    Clips come with the controls that the network is ``told``.
    """
    data = recipe.data
    encodings = [encoding_of(recipe, codec, card) for card in data.card] if is_precomputed(recipe) else []
    for encoding in encodings if encode else []:
        rank_zero_first(partial(make_cache, encoding, codec, recipe.hardware.accelerator), encoding.folder.name)
    is_ready = encode or all(encoding.is_whole() for encoding in encodings)
    caches = [encoding.folder for encoding in encodings] if is_ready else []
    if caches:
        codec.known_texts = TextStore(caches)
    return VideoDataModule(
        data.card,
        split=data.split,
        batch_size=data.batch_size,
        frames=data.frames,
        height=data.height,
        width=data.width,
        fps=data.fps or None,
        steps=batches_of(recipe),
        passes=recipe.hardware.accumulate,
        context=recipe.hardware.context,
        seed=recipe.run.seed,
        num_workers=data.num_workers,
        error_budget=data.error_budget,
        weights=data.weights,
        buckets=data.shapes[1:],
        streaming=data.streaming,
        shuffle_buffer=data.shuffle_buffer,
        cache=caches,
        codec_hash=encodings[0].fingerprint if encodings else None,
        token_side=codec.layout.multiple,
        controls=learnt_controls(told.controls, data.card, data.split) if told else None,
    )


def is_precomputed(recipe: Recipe) -> bool:
    """Whether training reads latents and embeddings encoded beforehand: the codec then stays in its files."""
    return recipe.data.precompute and not recipe.declared.trains_codec


def encoding_of(recipe: Recipe, codec: Codec, card: str) -> Encoding:
    """How a card's training split is encoded for this recipe; nothing is done yet."""
    return EncodingJob.of(recipe, card).encoding(codec)


def make_cache(encoding: Encoding, codec: Codec, accelerator: str) -> None:
    """Encode now, in this process, what ``anyflow data encode`` has not encoded."""
    if encoding.is_whole():
        return
    with encoding.held(), codec.lent(join_ranks(accelerator)):
        if encoding.is_whole():  # another process has made it meanwhile
            return
        print(f"encoding {encoding.title}: {estimate(encoding).told()}", file=sys.stderr)
        with progress_line(f"encoding {encoding.title}") as on_progress:
            encoding.all(on_progress)


def captions(recipe: Recipe) -> Iterator[str]:
    """Every training caption of the recipe's cards: what a new tokenizer learns its words from."""
    for card in recipe.data.card:
        split = find_split(card, recipe.data.split)
        reader = ShardReader([split.folder], [split.caption])
        for number, (_, shard) in enumerate(reader.shards):
            for sample in shard.samples:
                yield reader.describe(number, sample)["caption"]
