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
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from anyflow.backbone.protocol import Text
from anyflow.backbone.roles import Role, Roles, bind
from anyflow.flowmap.chunks import ChunkLayout
from anyflow.flowmap.intervals import keep_first_frame
from anyflow.flowmap.matching import critic_loss, matching_gradient, matching_loss, matching_timestep
from anyflow.flowmap.objective import Velocity
from anyflow.flowmap.rollout import BackwardSimulation, draw_simulation
from anyflow.flowmap.sampling import Take, take_jump
from anyflow.flowmap.tape import Tape
from anyflow.stages.base import world
from anyflow.stages.ema import Ema
from anyflow.stages.flow import FlowBatch
from anyflow.stages.forward import ForwardStage
from anyflow.stages.optimizers import build_optimizer, build_schedule
from anyflow.stages.options import EmaSettings, OnPolicySettings, OptimizerSettings
from anyflow.stages.parts import StageParts
from anyflow.stages.watch import DriftWatch, rollout_figures


@dataclass(frozen=True)
class Mover:
    """One optimiser of the stage: whose weights it moves, how, and how often in a whole run.

    Attributes:
        role: Whose weights.
        settings: How they move.
        updates: How many updates its schedule is for.
        field: Where the recipe has the settings.
    """

    role: Role
    settings: OptimizerSettings
    updates: int
    field: str


def onpolicy_movers(
    student: OptimizerSettings, settings: OnPolicySettings, steps: int, field: str = "optimizer"
) -> dict[str, Mover]:
    """The optimisers of so many on-policy steps; ``field`` is where the recipe has the student's."""
    return {
        "student": Mover("student", student, steps, field),
        "critic": Mover("critic", settings.critic, steps * settings.critic_turns, "stage.onpolicy.critic"),
    }


class OnPolicyStage(ForwardStage):
    """Distribution matching on the student's own samples, with forward co-training.

    Attributes:
        recompute_jumps: Keep the activations of one jump of a rollout instead of all, and take the others again.
        turn: Updates done of the step that is under way.
        movers: The optimisers, by name.
    """

    def __init__(
        self,
        roles: Roles,
        *args: Any,
        settings: OnPolicySettings,
        recompute_jumps: bool = False,
        ema: EmaSettings,
        movers: dict[str, Mover] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(roles.student, *args, ema=EmaSettings(decay=0.0), **kwargs)
        self.automatic_optimization = False
        self.settings = settings
        self.recompute_jumps = recompute_jumps
        self.roles = roles
        self.others = torch.nn.ModuleDict(roles.others)
        self.drift = DriftWatch()
        self.movers = movers or onpolicy_movers(self.optimizer_settings, settings, self.total_steps)
        if ema.decay > 0:
            self.ema = Ema([weight for _, weight in roles.parameters("student")], ema)

    @classmethod
    def build(cls, parts: StageParts) -> OnPolicyStage:
        """The stage of a recipe."""
        return cls(parts.taught, parts.codec, **cls.corrected(parts))

    @staticmethod
    def corrected(parts: StageParts) -> dict[str, Any]:
        """What stages take that correct the student on its own samples."""
        return {**parts.mapped, "settings": parts.options.onpolicy, "recompute_jumps": parts.recompute_jumps}

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One pass of the student's update or of the critic's."""
        return self.onpolicy_turn(self.prepare(batch))

    def onpolicy_turn(self, data: FlowBatch) -> Tensor:
        """Do a pass of the turn that is due, and the update that it completes."""
        is_students = self.turn == 0
        loss = self.generator_turn(data) if is_students else self.critic_turn(data)
        if self.is_between_updates:
            self.update("student" if is_students else "critic")
            self.turn = (self.turn + 1) % self.settings.turns
            self.step += self.turn == 0
        return loss

    def generator_turn(self, data: FlowBatch) -> Tensor:
        """Accumulate the student's gradient: distribution matching on its samples, the forward loss on data."""
        plan = self.draw_plan()
        tape = Tape(self.count_jumps(data, plan) - 1 if self.recompute_jumps else 0)
        samples = self.simulate(data, plan, tape.take)
        given = self.given_frames(data)
        timestep = matching_timestep(self.draw_own("matching", len(samples)), self.objective.shift)
        if given is not None:
            timestep = timestep[:, None].masked_fill(given, 0.0)
        found = matching_gradient(
            self.velocity(data.text, "critic"),
            self.velocity(data.text, "teacher"),
            samples,
            self.draw_noise("matching noise", samples),
            timestep,
            self.own_texts(data),
            extra_guidance=self.settings.extra_guidance,
            given_frames=given,
        )
        per_sample = matching_loss(samples, found.gradient)
        self.note_losses(per_sample)
        matching = self.mean_of_update(per_sample)
        self.manual_backward(matching / self.passes)
        tape.backward(lambda end, gradient: self.manual_backward(end, gradient=gradient))
        total = matching.detach()
        if self.settings.forward_weight > 0:
            forward = self.settings.forward_weight * self.forward_loss(data)
            self.manual_backward(forward / self.passes)
            self.report(forward_loss=forward.detach())
            total = total + forward.detach()
        figures = {"normaliser": found.normaliser.mean(), **rollout_figures(samples.detach(), data.clean)}
        self.report(loss=total, matching_loss=matching.detach(), **figures)
        self.warn_of_drift(figures)
        return total

    def critic_turn(self, data: FlowBatch) -> Tensor:
        """Accumulate the critic's gradient: flow matching on fresh samples."""
        with torch.no_grad():
            samples = self.simulate(data, self.draw_plan())
        timestep, loss_frames = self.draw_logit_normal("critic", len(samples), self.objective.shift), None
        if data.is_first_frame_given:
            timestep, _, loss_frames = keep_first_frame(timestep, timestep, samples.shape[1])
        per_sample = critic_loss(
            self.velocity(data.text, "critic"),
            samples,
            self.draw_noise("critic noise", samples),
            timestep,
            self.own_texts(data),
            loss_frames,
        )
        self.note_losses(per_sample)
        loss = self.mean_of_update(per_sample)
        self.manual_backward(loss / self.passes)
        self.report(critic_loss=loss.detach())
        self.warn_of_drift({"critic_loss": loss.detach()})
        return loss.detach()

    def draw_plan(self) -> BackwardSimulation:
        """The sampler that this update simulates; budget and step are the same on all ranks and in all passes."""
        uniforms = torch.rand(2, generator=self.generator("simulation"))
        return draw_simulation(uniforms, self.settings.budgets, self.objective.shift)

    def count_jumps(self, data: FlowBatch, plan: BackwardSimulation) -> int:
        """Jumps of a whole rollout: every part of the video takes those of the plan."""
        return len(plan.jumps) * len(self.roles.student.chunks_of(data.clean.shape[1]))

    def simulate(self, data: FlowBatch, plan: BackwardSimulation, take: Take = take_jump) -> Tensor:
        """Samples of this batch's prompts by backward simulation."""
        text = data.text.select(self.own_texts(data))
        noise = self.draw_noise("rollout", data.clean)
        return torch.cat(list(self.roles.generate("student", text, noise, plan.jumps, data.first_frames, take)), dim=1)

    def update(self, name: str) -> None:
        """One optimiser step of a mover."""
        mover, which = self.movers[name], list(self.movers).index(name)
        optimizer: Any = self.optimizers()[which]  # type: ignore[index]
        schedule: Any = self.lr_schedulers()[which]  # type: ignore[index]
        norm = self.clip_norm(optimizer, mover.settings, mover.field)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        self.report(**{"grad_norm" if mover.role == "student" else f"{mover.role}_grad_norm": norm})
        if mover.role == "student" and self.ema is not None:
            self.ema.update(self.step + 1)

    def warn_of_drift(self, figures: dict[str, Tensor]) -> None:
        """Say on rank 0 what the figures of the student's samples have come to, and why that may be."""
        if not self.settings.watch:
            return
        values = torch.stack([value.double() for value in figures.values()]).tolist()
        for sentence in self.drift.see(dict(zip(figures, values, strict=True))):
            if world()[0] == 0:
                print(f"warning, step {self.step}: {sentence}", file=sys.stderr, flush=True)

    def velocity(self, text: Text, role: Role = "student", *, layout: ChunkLayout | None = None) -> Velocity:
        """The seam of a role with this batch's texts bound."""
        return bind(self.roles, role, text, **({} if layout is None else {"layout": layout}))

    def own_texts(self, data: FlowBatch) -> Tensor:
        """Rows of the samples' own prompts: nothing is dropped from a rollout."""
        return torch.arange(len(data.clean), device=self.device)

    def given_frames(self, data: FlowBatch) -> Tensor | None:
        """``[B, F]`` mask of given frames, None where there are none."""
        if not data.is_first_frame_given:
            return None
        given = torch.zeros(data.clean.shape[:2], dtype=torch.bool, device=self.device)
        given[:, 0] = True
        return given

    def draw_own(self, purpose: str, batch_size: int) -> Tensor:
        """Uniforms ``[B]`` of this rank's samples."""
        own = self.own_samples(batch_size)
        return torch.stack([torch.rand((), generator=self.generator(purpose, i)) for i in own]).to(self.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizers, schedules = [], []
        for mover in self.movers.values():
            optimizers.append(build_optimizer(mover.settings, self.roles.parameters(mover.role)))
            schedules.append(build_schedule(mover.settings, optimizers[-1], mover.updates))
        return optimizers, schedules  # type: ignore[return-value]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.roles.place(self.device)

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "drift": copy.deepcopy(self.drift.state)}

    def count_from(self, counters: dict[str, Any]) -> None:
        super().count_from(counters)
        self.drift.state = counters["drift"]
