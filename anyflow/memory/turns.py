"""What one training step asks of its networks, at its heaviest: each turn of a stage, in the order of the stages.

At its heaviest every sample moves and no text is dropped, so the finite difference and the guided pass are both needed.
A rollout takes all three jumps. A causal network trains its longest layout and all frames at once in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.conditions import Conditions, Text
from anyflow.backbone.controls import controls_of
from anyflow.backbone.protocol import FlowMapBackbone
from anyflow.backbone.roles import Role, Roles
from anyflow.flowmap.chunks import ChunkLayout, layout_of
from anyflow.flowmap.sampling import Jump, Take, take_jump
from anyflow.flowmap.tape import Tape
from anyflow.recipe import Recipe

LONGEST_TEXT = 513
"""A prompt of full length, and the spare token of its padding."""

JUMPS: tuple[Jump, ...] = ((1000.0, 900.0), (900.0, 700.0), (700.0, 0.0))
"""As many as a rollout can have."""


def turns(
    recipe: Recipe, roles: Roles, latents: tuple[int, int, int, int], next_phase: Callable[[], None]
) -> dict[Role, Callable[[], None]]:
    """By role, its turn of a step: it leaves gradients behind. ``next_phase`` is called between its parts."""
    step = HeaviestStep(recipe, roles, latents, next_phase)
    declared = recipe.declared.turns.items()
    return {role: partial(turn, step) if callable(turn) else getattr(step, turn) for role, turn in declared}


def sample_once(recipe: Recipe, roles: Roles, latents: tuple[int, int, int, int], rows: int) -> None:
    """Sample so many clips of full-length prompts, as a curve does, but in one step: further ones take no more."""
    width = roles.student.transformer.config.text_dim
    # a guided call asks all questions at once
    rows *= 1 + (recipe.sampled_guidance != 1) + (recipe.sampling.control_guidance_scale != 1)
    noise, given = torch.empty(rows, *latents), recipe.sampling.given_frames
    conditions = told_to(roles.student, full_length(rows, width, noise[:, :given] if given else None), latents[0])
    with torch.no_grad():
        parts = roles.generate("student", conditions, noise, JUMPS[:1])
        torch.cat(list(parts), dim=1)


class HeaviestStep:
    """The turns that stages are made of, on stand-ins for a batch."""

    def __init__(
        self, recipe: Recipe, roles: Roles, latents: tuple[int, int, int, int], next_phase: Callable[[], None]
    ) -> None:
        self.stage, self.batch = recipe.stage, recipe.data.batch_size
        self.recompute_jumps = recipe.hardware.recompute_jumps
        self.roles, self.latents, self.next_phase = roles, latents, next_phase
        self.text_width = roles.student.transformer.config.text_dim
        self.layout = _longest_layout(roles, latents[0])

    def generator(self) -> None:
        """Samples with their graph, judged; the loss on data with its own."""
        jumps = JUMPS[: max(self.stage.onpolicy.budgets)]
        parts = len(self.roles.student.chunks_of(self.latents[0]))
        if self.recompute_jumps:  # what is taken again holds nothing until then: as few as show both kinds
            jumps = jumps[: 2 if parts == 1 else 1]
        tape = Tape(len(jumps) * parts - 1 if self.recompute_jumps else 0)
        samples = self.rollout(jumps, tape.take)
        self.next_phase()
        with torch.no_grad():
            judged = [self.ask(role, self.batch) for role in ("critic", "teacher", "teacher")]  # type: ignore[arg-type]
        self.next_phase()
        ((samples - judged[0]) * samples.double()).mean().backward()
        del samples, judged
        self.next_phase()
        tape.backward(lambda end, gradient: end.backward(gradient))
        self.next_phase()
        if self.stage.onpolicy.forward_weight > 0:
            self.flow_map()

    def critic(self) -> None:
        """Fresh samples without graph, and flow matching on them."""
        with torch.no_grad():
            self.rollout(JUMPS[:1])  # the others would find what this one found
        self.next_phase()
        self.learn("critic", self.ask("critic", self.batch))

    def consistency(self) -> None:
        """The teacher's path, then as the flow-map objective."""
        with torch.no_grad():
            self.ask("teacher", (2 if self.stage.guidance_scale != 1 else 1) * self.batch, layout=self.layout)
        self.flow_map()

    def flow_map(self) -> None:
        """The flow-map objective: all that needs no gradient in one pass, then the pass with it."""
        is_fused = self.stage.guidance_scale != 1
        with torch.no_grad():
            self.ask("student", (3 if is_fused else 2) * self.batch, layout=self.layout)
        self.next_phase()
        answer = self.ask("student", self.batch, layout=self.layout)
        self.learn("student", answer, *self.all_frames(is_fused))

    def flow_matching(self) -> None:
        """Plain flow matching."""
        answer = self.ask("student", self.batch, layout=self.layout)
        self.learn("student", answer, *self.all_frames(is_fused=False))

    def all_frames(self, is_fused: bool) -> list[Tensor]:
        """A causal network's second loss, on all frames at once."""
        if self.layout is None or self.stage.bidirectional_prob == 0:
            return []
        self.next_phase()
        if is_fused:
            with torch.no_grad():
                self.ask("student", self.batch)
        return [self.ask("student", self.batch)]

    def learn(self, role: Role, *answers: Tensor) -> None:
        """The backward pass of a loss."""
        self.next_phase()
        torch.stack([answer.square().mean() for answer in answers]).sum().backward()
        self.next_phase()

    def rollout(self, jumps: Sequence[Jump], take: Take = take_jump) -> Tensor:
        """Samples of the student."""
        noise = torch.empty(self.batch, *self.latents)
        first_frames = noise[:, :1] if self.stage.i2v_prob > 0 else None
        own = full_length(self.batch, self.text_width, first_frames)
        conditions = told_to(self.roles.student, own, noise.shape[1])
        parts = self.roles.generate("student", conditions, noise, jumps, take)
        return torch.cat(list(parts), dim=1)

    def ask(self, role: Role, clips: int, layout: ChunkLayout | None = None) -> Tensor:
        """One answer; times are per frame where some frames are given."""
        frames, *rest = self.latents
        frames = frames if layout is None else layout.num_frames
        times = torch.empty((clips, frames) if layout is not None or self.stage.i2v_prob > 0 else clips)
        view: dict[str, Any] = {} if layout is None else {"layout": layout}
        conditions = told_to(self.roles.student, full_length(clips, self.text_width), frames)
        return self.roles(role, torch.empty(clips, frames, *rest), times, times, conditions, **view)


def told_to(network: FlowMapBackbone, conditions: Conditions, frames: int) -> Conditions:
    """With controls for so many latent frames, if the network knows any."""
    known = controls_of(network.transformer)
    if known is None:
        return conditions
    clips = len(conditions.text.embeddings)
    return conditions._replace(controls=torch.empty(clips, frames, known.pixel_frames, known.numbers))


def full_length(clips: int, width: int, first_frames: Tensor | None = None) -> Conditions:
    """Prompts of full length, and given frames if any."""
    return Conditions(Text(torch.empty(clips, LONGEST_TEXT, width), None, LONGEST_TEXT), first_frames)


def _longest_layout(roles: Roles, num_frames: int) -> ChunkLayout | None:
    """Of what a causal network may be trained on, what has most tokens."""
    student = roles.student
    if not student.is_causal:
        return None
    config = student.transformer.config
    chunks, limit = student.chunks_of(num_frames), config.full_chunk_limit
    smaller = config.compressed_patch_size[1] * config.compressed_patch_size[2] / 4

    def tokens(layout: ChunkLayout) -> float:
        return 2 * layout.full_frames + layout.context_frames / smaller

    return max((layout_of(chunks[:count], limit) for count in range(1, len(chunks) + 1)), key=tokens)
