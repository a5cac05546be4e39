"""On-policy distillation: the student corrects itself on what it samples (section 4).

generator's turn:  samples = backward simulation from noise, with the graph of all jumps
                   gradient = critic's clean prediction - teacher's, of the noised samples  (flowmap/matching.py)
                   loss = |samples - stop_grad(samples - gradient)|^2 + forward flow-map loss on data
critic's turn:     on a fresh batch, fresh samples without graph; plain flow matching on them

A step has several updates, the student's and the critic's: whose turn it is is a state of its own, and a run killed
between two of them goes on with the one that is due.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyflow.backbone.codec import Codec
from anyflow.backbone.roles import Roles
from anyflow.flowmap.intervals import IntervalShares, keep_first_frame
from anyflow.flowmap.matching import critic_loss, matching_gradient, matching_loss, matching_timestep
from anyflow.flowmap.objective import FlowMapObjective
from anyflow.flowmap.rollout import BackwardSimulation, draw_simulation
from anyflow.flowmap.sampling import Take, take_jump
from anyflow.flowmap.tape import Tape
from anyflow.stages.base import Stage, Training
from anyflow.stages.batch import Batches, Conditioning, FlowBatch
from anyflow.stages.forward import ForwardLoss
from anyflow.stages.optimizers import OptimizerGroup
from anyflow.stages.options import OnPolicySettings, OptimizerSettings
from anyflow.stages.parts import StageParts
from anyflow.stages.update import Loss, Update, world
from anyflow.stages.watch import DriftWatch, rollout_figures

Backward = Callable[..., None]
"""Accumulates gradients of a loss, or of a tensor whose ``gradient=`` is given: a stage's ``manual_backward``."""


class Rollouts:
    """The student's samples of a batch's prompts, by backward simulation of its sampler."""

    def __init__(self, roles: Roles, update: Update, settings: OnPolicySettings, shift: float) -> None:
        self.roles, self.update, self.settings, self.shift = roles, update, settings, shift

    def draw(self) -> BackwardSimulation:
        """The sampler that this update simulates; budget and step are the same on all ranks and in all passes."""
        return draw_simulation(self.update.draw_all("simulation", 2), self.settings.budgets, self.shift)

    def count_jumps(self, data: FlowBatch, plan: BackwardSimulation) -> int:
        """Jumps of a whole rollout: every part of the video takes those of the plan."""
        return len(plan.jumps) * len(self.roles.student.chunks_of(data.clean.shape[1]))

    def sample(self, data: FlowBatch, plan: BackwardSimulation, take: Take = take_jump) -> Tensor:
        """Clean latents, shaped as the data."""
        noise = self.update.draw_noise("rollout", data.clean)
        return torch.cat(list(self.roles.generate("student", data.conditions, noise, plan.jumps, take)), dim=1)


class Correction:
    """The two turns of a step: distribution matching on the student's own samples, with co-training on data.

    Attributes:
        roles: Student, critic and teacher.
        rollouts: The student's samples.
        on_data: The loss of co-training.
        settings: The recipe's.
        recompute_jumps: Keep the activations of one jump of a rollout instead of all, and take the others again.
        drift: Watches the figures of the samples.
        warnings: What the last turn's figures say of the student, and why that may be.
    """

    def __init__(
        self,
        roles: Roles,
        rollouts: Rollouts,
        on_data: Callable[[FlowBatch], Loss],
        settings: OnPolicySettings,
        *,
        recompute_jumps: bool = False,
    ) -> None:
        self.roles, self.rollouts, self.on_data, self.settings = roles, rollouts, on_data, settings
        self.recompute_jumps = recompute_jumps
        self.update, self.shift = rollouts.update, rollouts.shift
        self.critic, self.teacher = partial(roles, "critic"), partial(roles, "teacher")
        self.drift = DriftWatch()
        self.warnings: list[str] = []

    def take_turn(self, turn: int, data: FlowBatch, backward: Backward) -> Loss:
        """Accumulate the gradient of a turn: of the first the student's, of the others the critic's."""
        return self.generator_turn(data, backward) if turn == 0 else self.critic_turn(data, backward)

    def generator_turn(self, data: FlowBatch, backward: Backward) -> Loss:
        """Accumulate the student's gradient: distribution matching on its samples, the loss on data."""
        update, passes = self.update, self.update.passes
        plan = self.rollouts.draw()
        tape = Tape(self.rollouts.count_jumps(data, plan) - 1 if self.recompute_jumps else 0)
        samples = self.rollouts.sample(data, plan, tape.take)
        given = given_frames(data)
        timestep = matching_timestep(update.draw_own("matching", samples), self.shift)
        if given is not None:
            timestep = timestep[:, None].masked_fill(given, 0.0)
        found = matching_gradient(
            data.velocity(self.critic),
            data.velocity(self.teacher),
            samples,
            update.draw_noise("matching noise", samples),
            timestep,
            data.own_rows,
            extra_guidance=self.settings.extra_guidance,
            given_frames=given,
        )
        per_sample = matching_loss(samples, found.gradient)
        update.note(per_sample)
        matching = update.mean(per_sample)
        backward(matching / passes)
        tape.backward(lambda end, gradient: backward(end, gradient=gradient))
        total = matching.detach()
        figures: dict[str, Tensor] = {}
        if self.settings.forward_weight > 0:
            on_data, figures = self.on_data(data)
            forward = self.settings.forward_weight * on_data
            backward(forward / passes)
            figures |= {"forward_loss": forward.detach()}
            total = total + forward.detach()
        watched = {"normaliser": found.normaliser.mean(), **rollout_figures(samples.detach(), data.clean)}
        self.watch(watched)
        return Loss(total, {**figures, "loss": total, "matching_loss": matching.detach(), **watched})

    def critic_turn(self, data: FlowBatch, backward: Backward) -> Loss:
        """Accumulate the critic's gradient: flow matching on fresh samples."""
        update = self.update
        with torch.no_grad():
            samples = self.rollouts.sample(data, self.rollouts.draw())
        timestep, loss_frames = update.draw_logit_normal("critic", samples, self.shift), None
        if data.is_first_frame_given:
            timestep, _, loss_frames = keep_first_frame(timestep, timestep, samples.shape[1])
        noise = update.draw_noise("critic noise", samples)
        per_sample = critic_loss(data.velocity(self.critic), samples, noise, timestep, data.own_rows, loss_frames)
        update.note(per_sample)
        loss = update.mean(per_sample)
        backward(loss / update.passes)
        figures = {"critic_loss": loss.detach()}
        self.watch(figures)
        return Loss(loss.detach(), figures)

    def watch(self, figures: Mapping[str, Tensor]) -> None:
        """Compare a turn's figures with those that the run began with."""
        if self.settings.watch:
            values = torch.stack([value.double() for value in figures.values()]).tolist()
            self.warnings = self.drift.see(dict(zip(figures, values, strict=True)))

    def counters(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"drift": copy.deepcopy(self.drift.state)}

    def count_from(self, counters: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.drift.state = counters["drift"]


def given_frames(data: FlowBatch) -> Tensor | None:
    """``[B, F]`` mask of given frames, None where there are none."""
    if not data.is_first_frame_given:
        return None
    given = torch.zeros(data.clean.shape[:2], dtype=torch.bool, device=data.clean.device)
    given[:, 0] = True
    return given


def onpolicy_groups(
    student: OptimizerSettings, settings: OnPolicySettings, steps: int, field: str = "optimizer"
) -> dict[str, OptimizerGroup]:
    """The optimisers of so many on-policy steps; ``field`` is where the recipe has the student's."""
    return {
        "student": OptimizerGroup("student", student, steps, field),
        "critic": OptimizerGroup("critic", settings.critic, steps * settings.critic_turns, "stage.onpolicy.critic"),
    }


def correct(stage: Stage, correction: Correction, data: FlowBatch) -> Tensor:
    """One pass of the turn that is due, in a stage with :func:`onpolicy_groups`; returns its loss."""
    whose = "student" if stage.turn == 0 else "critic"
    loss, figures = correction.take_turn(stage.turn, data, stage.manual_backward)
    stage.report(**figures)
    for sentence in correction.warnings:
        if world()[0] == 0:
            print(f"warning, step {stage.step}: {sentence}", file=sys.stderr, flush=True)
    stage.end_turn(whose, correction.settings.turns)
    return loss


class OnPolicyStage(Stage):
    """Distribution matching on the student's own samples, with forward co-training."""

    def __init__(
        self,
        roles: Roles,
        codec: Codec,
        training: Training,
        conditioning: Conditioning,
        *,
        objective: FlowMapObjective,
        settings: OnPolicySettings,
        shares: IntervalShares | None = None,
        recompute_jumps: bool = False,
    ) -> None:
        groups = onpolicy_groups(training.optimizer, settings, training.total_steps)
        super().__init__(roles.student, training, codec=codec, roles=roles, groups=groups)
        self.backbone = roles.student
        self.batches = Batches(codec, conditioning, self.update)
        self.shares = shares or IntervalShares()
        on_data = ForwardLoss(roles.student, self.batches, objective, self.shares)
        rollouts = Rollouts(roles, self.update, settings, objective.shift)
        self.correction = Correction(roles, rollouts, on_data, settings, recompute_jumps=recompute_jumps)
        self.counted = (on_data, self.correction)

    @classmethod
    def build(cls, parts: StageParts) -> OnPolicyStage:
        """The stage of a recipe."""
        return cls(
            parts.taught,
            parts.codec,
            parts.training,
            parts.conditioning,
            objective=parts.objective,
            settings=parts.options.onpolicy,
            shares=parts.shares,
            recompute_jumps=parts.recompute_jumps,
        )

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One pass of the student's update or of the critic's."""
        data = self.batches.prepare(batch, self.device, from_samples=self.learns_from_samples)
        return correct(self, self.correction, data)
