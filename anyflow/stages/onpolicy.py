"""On-policy distillation: the student corrects itself on what it samples (section 4).

generator's turn:  samples = backward simulation from noise, with the graph of all jumps
                   gradient = critic's clean prediction - teacher's, of the noised samples  (flowmap/matching.py)
                   loss = |samples - stop_grad(samples - gradient)|^2 + forward flow-map loss on data
critic's turn:     on a fresh batch, fresh samples without graph; plain flow matching on them

Every batch of the stream is one turn, so the place in the data says nothing of the step: the turn is a state of its
own, and a run killed between the two updates goes on with the one that is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from anyflow.backbone.roles import Role, Roles, bind
from anyflow.flowmap.intervals import keep_first_frame
from anyflow.flowmap.matching import critic_loss, matching_gradient, matching_loss, matching_timestep
from anyflow.flowmap.objective import Velocity
from anyflow.flowmap.rollout import DEFAULT_BUDGETS, draw_simulation
from anyflow.flowmap.schedule import logit_normal_timestep
from anyflow.stages.ema import Ema, EmaSettings
from anyflow.stages.flow import FlowBatch
from anyflow.stages.forward import ForwardStage
from anyflow.stages.optimizers import OptimizerSettings, build_optimizer, build_schedule


@dataclass(frozen=True)
class OnPolicySettings:
    """The options of the stage; the defaults are the released recipe, but for the budget of one step.

    Attributes:
        budgets: Step counts that are simulated. Without 1 among them quality at one step falls.
        extra_guidance: The teacher's: ``cond + extra * (cond - uncond)``, a usual guidance scale of 1 + extra.
        forward_weight: Of the forward loss in the student's step; without it long rollouts decay. 0 leaves it out.
        critic_turns: Critic updates for each of the student's.
        accumulate: Batches whose gradients make one update.
    """

    budgets: Sequence[int] = DEFAULT_BUDGETS
    extra_guidance: float = 3.0
    forward_weight: float = 1.0
    critic_turns: int = 1
    accumulate: int = 1

    @property
    def turns(self) -> int:
        """Batches of one step: the student's, then the critic's."""
        return self.accumulate * (1 + self.critic_turns)


class OnPolicyStage(ForwardStage):
    """Distribution matching on the student's own samples, with forward co-training.

    Attributes:
        turn: Batches done of the step that is under way.
    """

    def __init__(
        self,
        roles: Roles,
        *args: Any,
        settings: OnPolicySettings,
        critic_optimizer: OptimizerSettings,
        ema: EmaSettings,
        **kwargs: Any,
    ) -> None:
        super().__init__(roles.student, *args, ema=EmaSettings(decay=0.0), **kwargs)
        self.automatic_optimization = False
        self.settings = settings
        self.critic_optimizer_settings = critic_optimizer
        self.roles = roles
        self.others = torch.nn.ModuleDict(roles.others)
        self.turn = 0
        if ema.decay > 0:
            self.ema = Ema([weight for _, weight in roles.parameters("student")], ema)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One turn: part of the student's update or of the critic's."""
        data = self.prepare(batch)
        is_students = self.turn < self.settings.accumulate
        self.turn += 1
        loss = self.generator_turn(data) if is_students else self.critic_turn(data)
        if self.turn % self.settings.accumulate == 0:
            self.update("student" if is_students else "critic")
        if self.turn == self.settings.turns:
            self.turn = 0
            self.step += 1
        return loss

    def generator_turn(self, data: FlowBatch) -> Tensor:
        """Accumulate the student's gradient: distribution matching on its samples, the forward loss on data."""
        samples = self.simulate(data)
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
        matching = per_sample.mean()
        self.manual_backward(matching / self.settings.accumulate)
        total = matching.detach()
        if self.settings.forward_weight > 0:
            forward = self.settings.forward_weight * self.forward_loss(data)
            self.manual_backward(forward / self.settings.accumulate)
            self.report(forward_loss=forward.detach())
            total = total + forward.detach()
        self.report(
            loss=total, matching_loss=matching.detach(), normaliser=found.normaliser.mean(), **watch(samples, data)
        )
        return total

    def critic_turn(self, data: FlowBatch) -> Tensor:
        """Accumulate the critic's gradient: flow matching on fresh samples."""
        with torch.no_grad():
            samples = self.simulate(data)
        normals = torch.stack(
            [torch.randn((), generator=self.generator("critic", i)) for i in self.global_indices(len(samples))]
        )
        timestep, loss_frames = logit_normal_timestep(normals, self.objective.shift).to(self.device), None
        if self.given_frames(data) is not None:
            timestep, _, loss_frames = keep_first_frame(timestep, timestep, samples.shape[1], data.first_frame_given)
        per_sample = critic_loss(
            self.velocity(data.text, "critic"),
            samples,
            self.draw_noise("critic noise", samples),
            timestep,
            self.own_texts(data),
            loss_frames,
        )
        self.note_losses(per_sample)
        loss = per_sample.mean()
        self.manual_backward(loss / self.settings.accumulate)
        self.report(critic_loss=loss.detach())
        return loss.detach()

    def simulate(self, data: FlowBatch) -> Tensor:
        """Samples of this batch's prompts by backward simulation; budget and step are the same on all ranks."""
        plan = draw_simulation(
            torch.rand(2, generator=self.generator("simulation")), self.settings.budgets, self.objective.shift
        )
        rows = self.own_texts(data)
        student = self.velocity(data.text)
        first_frames = data.clean[:, :1] if bool(data.first_frame_given.any()) else None
        return plan.run(lambda z, t, r: student(z, t, r, rows), self.draw_noise("rollout", data.clean), first_frames)

    def update(self, role: Role) -> None:
        """One optimiser step of the student or the critic."""
        is_students = role == "student"
        which = 0 if is_students else 1
        optimizer: Any = self.optimizers()[which]  # type: ignore[index]
        schedule: Any = self.lr_schedulers()[which]  # type: ignore[index]
        settings = self.optimizer_settings if is_students else self.critic_optimizer_settings
        field = "optimizer" if is_students else "stage.onpolicy.critic"
        norm = self.clip_norm(optimizer, settings, field)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        self.report(**{"grad_norm" if is_students else "critic_grad_norm": norm})
        if is_students and self.ema is not None:
            self.ema.update(self.step + 1)

    def velocity(self, text: Any, role: Role = "student") -> Velocity:
        """The seam of a role with this batch's texts bound."""
        return bind(self.roles, role, text)

    def own_texts(self, data: FlowBatch) -> Tensor:
        """Rows of the samples' own prompts: nothing is dropped from a rollout."""
        return torch.arange(len(data.clean), device=self.device)

    def given_frames(self, data: FlowBatch) -> Tensor | None:
        """``[B, F]`` mask of given frames, None where there are none."""
        if not bool(data.first_frame_given.any()):
            return None
        given = torch.zeros(data.clean.shape[:2], dtype=torch.bool, device=self.device)
        given[:, 0] = True
        return given

    def draw_own(self, purpose: str, batch_size: int) -> Tensor:
        """Uniforms ``[B]`` of this rank's samples."""
        own = self.global_indices(batch_size)
        return torch.stack([torch.rand((), generator=self.generator(purpose, i)) for i in own]).to(self.device)

    def draw_noise(self, purpose: str, like: Tensor) -> Tensor:
        """Standard normal shaped as the latents, sample by sample."""
        own = self.global_indices(len(like))
        noise = [torch.randn(like.shape[1:], generator=self.generator(purpose, i)) for i in own]
        return torch.stack(noise).to(like)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        pairs: list[tuple[Role, OptimizerSettings, int]] = [
            ("student", self.optimizer_settings, 1),
            ("critic", self.critic_optimizer_settings, self.settings.critic_turns),
        ]
        optimizers = [build_optimizer(settings, self.roles.parameters(role)) for role, settings, _ in pairs]
        schedules = [
            build_schedule(settings, optimizer, self.total_steps * updates)
            for (_, settings, updates), optimizer in zip(pairs, optimizers, strict=True)
        ]
        return optimizers, schedules  # type: ignore[return-value]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.roles.frozen is not None:
            self.roles.frozen.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["anyflow"]["turn"] = self.turn

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.turn = checkpoint["anyflow"]["turn"]


@torch.no_grad()
def watch(samples: Tensor, data: FlowBatch) -> dict[str, Tensor]:
    """What goes wrong first: the samples' level, spread and motion, each over the data's (1 is healthy).

    Spread that falls is collapse; that rises, oversaturation. Motion is the mean difference of neighbouring frames: a
    falling one is the static video that distribution matching is known for.
    """

    def motion(latents: Tensor) -> Tensor:
        return latents.diff(dim=1).abs().mean()

    figures = {"sample_mean": samples.mean(), "spread_ratio": samples.std() / data.clean.std()}
    if samples.shape[1] > 1:
        figures["motion_ratio"] = motion(samples) / motion(data.clean).clamp(min=1e-6)
    return figures
