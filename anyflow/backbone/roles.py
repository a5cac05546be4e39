"""Student, critic and teacher: three velocity fields, as adapters on ONE frozen base or as three networks.

On-policy distillation asks three networks about the same latents (sec. 4). With adapters they share their base: the
teacher is the base itself (or an adapter of its own on it), student and critic are adapters. In full training they are
separate networks. A stage asks ``roles(role, latents, t, r, conditions)`` and does not know which.

Switching adapters is full of traps that raise no error, so it is done here and nowhere else:

- PEFT's ``set_adapter`` flips ``requires_grad``, and a student whose graph is alive silently loses its gradients.
  Here ``requires_grad`` is set once, and only the name of the speaking adapter changes.
- Gradient checkpointing runs a block again in the backward pass, when another adapter may speak. Here the name is
  pinned inside what is recomputed.
- The student's adapter on the delta embedder must not reach the teacher. Here a role sees its own adapter alone, on
  every layer, and the time embedders of critic and teacher are the base's. So are the modules that only the student
  trains in full: critic and teacher see all frames at once, where a causal network has no compressed ones. What embeds
  the controls each of them trains for itself, if the teacher knows any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anyflow.backbone.conditions import Conditions
from anyflow.backbone.controls import MODULE as CONTROLS
from anyflow.backbone.controls import controls_of
from anyflow.backbone.full import FullModule, original_name
from anyflow.backbone.lora import ADAPTER, LoraSettings, add_lora, has_lora, lora_settings
from anyflow.backbone.parallelize import is_sharded_module
from anyflow.backbone.protocol import Ask, FlowMapBackbone
from anyflow.flowmap.sampling import Jump, Take, take_jump

Role = Literal["student", "critic", "teacher"]
ROLES: tuple[Role, ...] = ("student", "critic", "teacher")


class Roles:
    """Three velocity fields behind one call.

    Attributes:
        student: The network that is sampled and exported; left alone it answers as the student.
        others: Modules besides the student that hold trained weights; a stage registers them as its own.
        frozen: A module besides the student that is never trained nor saved, or None.
        teacher_is_told: Whether the teacher knows controls; the critic does where it does.
    """

    teacher_is_told = False

    def __init__(self, student: FlowMapBackbone) -> None:
        self.student = student
        self.others: dict[str, nn.Module] = {}
        self.frozen: nn.Module | None = None

    def __call__(
        self, role: Role, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions, **view: Any
    ) -> Tensor:
        """The mean velocity in the eyes of a role; see :class:`~anyflow.backbone.protocol.FlowMapBackbone`.

        ``view`` are what more the network can be asked for: see :class:`~anyflow.backbone.causal.CausalBackbone`.
        """
        raise NotImplementedError

    def generate(
        self, role: Role, conditions: Conditions, noise: Tensor, jumps: Sequence[Jump], take: Take = take_jump
    ) -> Iterator[Tensor]:
        """What a role makes of noise, part by part; see :meth:`anyflow.backbone.protocol.FlowMapBackbone.generate`."""
        return self.network(role).generate(conditions, noise, jumps, ask=partial(self, role), take=take)

    def network(self, role: Role) -> FlowMapBackbone:
        """The network that answers for a role."""
        return self.student

    def parameters(self, role: Role) -> list[tuple[str, nn.Parameter]]:
        """A role's trained weights by name; empty for a frozen teacher."""
        raise NotImplementedError

    @torch.no_grad()
    def copy(self, source: Role, target: Role) -> None:
        """Give one role the weights of another, trained or not: a critic starts from its teacher."""
        raise NotImplementedError

    @property
    def networks(self) -> list[FlowMapBackbone]:
        """Every network once."""
        return [self.student]

    def place(self, device: torch.device) -> None:
        """Put what no stage owns on a device; sharded weights stay where they are: in host memory, if offloaded."""
        if self.frozen is not None and not is_sharded_module(self.frozen):
            self.frozen.to(device)

    @property
    def weight_bytes(self) -> int:
        """Memory of all roles' weights; what they share counts once."""
        modules = [self.student, *self.others.values(), *([self.frozen] if self.frozen is not None else [])]
        weights = {id(weight): weight for module in modules for weight in module.parameters()}
        return sum(weight.numel() * weight.element_size() for weight in weights.values())


class SeparateRoles(Roles):
    """Three networks, for full training.

    Args:
        student: trained.
        teacher: where the critic starts, too.
        trains_teacher: whether the teacher is trained (adapted to a domain) before it teaches.
        has_critic: whether there is a critic.
    """

    def __init__(
        self,
        student: FlowMapBackbone,
        teacher: FlowMapBackbone,
        *,
        trains_teacher: bool = False,
        has_critic: bool = True,
    ) -> None:
        super().__init__(student)
        self._networks: dict[Role, FlowMapBackbone] = {"student": student}
        if has_critic:
            self._networks["critic"] = self.others["critic"] = copy.deepcopy(teacher).requires_grad_(True)
        self._networks["teacher"] = teacher.requires_grad_(trains_teacher)
        self.teacher_is_told = controls_of(teacher.transformer) is not None
        if trains_teacher:
            self.others["teacher"] = teacher
        self.frozen = None if trains_teacher else teacher

    def __call__(
        self, role: Role, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions, **view: Any
    ) -> Tensor:
        return self._networks[role](latents, timestep, r_timestep, conditions, **view)

    def network(self, role: Role) -> FlowMapBackbone:
        return self._networks[role]

    @property
    def networks(self) -> list[FlowMapBackbone]:
        return list(self._networks.values())

    def parameters(self, role: Role) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self._networks[role].named_parameters() if weight.requires_grad]

    def copy(self, source: Role, target: Role) -> None:
        self._networks[target].load_state_dict(self._networks[source].state_dict())


class AdapterRoles(Roles):
    """Adapters on one frozen base: the student's is the network's own, the critic's is added here.

    Args:
        backbone: a network that carries the student's adapter (``default``), and possibly one named ``teacher``.
        settings: of the adapters that are added; their targets lose the time embedders, and nothing beside them is
            trained in full but what embeds the controls.
        trains_teacher: add a teacher's adapter to be trained (adapted to a domain) before it teaches.
        has_critic: whether there is a critic.
        base_is_told: whether the base has learnt the controls that it embeds. Where the teacher knows none, the critic
            is told none either: two that know other things do not compare.
        seed: of the new adapters' weights, which change nothing at first.
    """

    def __init__(
        self,
        backbone: FlowMapBackbone,
        settings: LoraSettings,
        *,
        trains_teacher: bool = False,
        has_critic: bool = True,
        base_is_told: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone)
        if not has_lora(backbone):
            raise ValueError("the network carries no adapter: add the student's before its roles")
        blocks_alone = [target for target in settings.targets if "_embedder" not in target]
        named = any(f"{CONTROLS}.lora_full.teacher." in name for name, _ in backbone.named_parameters())
        is_told = base_is_told or trains_teacher or named
        self.teacher_is_told = is_told and controls_of(backbone.transformer) is not None
        full = tuple(name for name in settings.full if name == CONTROLS and is_told)
        settings = replace(settings, targets=blocks_alone or settings.targets, full=full)
        if "teacher" in backbone.transformer.peft_config:
            settings = lora_settings(backbone, "teacher")  # so that the critic can start as its copy
        elif trains_teacher:
            add_lora(backbone, settings, seed=seed + 1, adapter="teacher")
        if has_critic:
            add_lora(backbone, settings, seed=seed + 2, adapter="critic")
        self._adapters: dict[Role, str | None] = {
            "student": ADAPTER,
            "critic": "critic",
            "teacher": "teacher" if "teacher" in backbone.transformer.peft_config else None,
        }
        self._layers = _adapted_layers(backbone.transformer)
        self._speaking: str | None = ADAPTER
        trained = {ADAPTER, "critic", *(["teacher"] if trains_teacher else [])}
        for name, weight in backbone.transformer.named_parameters():
            weight.requires_grad_(_adapter_of(name) in trained)
        for layer in self._layers:
            layer._active_adapter = [ADAPTER]
        if backbone.transformer.gradient_checkpointing:
            self._checkpoint = backbone.transformer._gradient_checkpointing_func
            backbone.transformer.enable_gradient_checkpointing(self._pinned_checkpoint)
        if has_critic:
            self.copy("teacher", "critic")

    def __call__(
        self, role: Role, latents: Tensor, timestep: Tensor, r_timestep: Tensor, conditions: Conditions, **view: Any
    ) -> Tensor:
        before, self._speaking = self._speaking, self._adapters[role]
        try:
            with _speaking(self._layers, self._speaking):
                return self.student(latents, timestep, r_timestep, conditions, **view)
        finally:
            self._speaking = before

    def parameters(self, role: Role) -> list[tuple[str, nn.Parameter]]:
        named = self.student.named_parameters()
        return [
            (name, weight)
            for name, weight in named
            if weight.requires_grad and _adapter_of(name) == self._adapters[role]
        ]

    @torch.no_grad()
    def copy(self, source: Role, target: Role) -> None:
        adapter, other = self._adapters[source], self._adapters[target]
        weights = dict(self.student.named_parameters())
        for name in [name for name in weights if _adapter_of(name) == other]:
            sources = name.replace(f".{other}.", f".{adapter}."), original_name(name)
            if ".lora_full." in name:
                self._copy_full(name, weights[sources[0] if sources[0] in weights else sources[1]])
            elif adapter is not None:
                weights[name].copy_(weights[sources[0]])
            elif ".lora_B." in name:
                weights[name].zero_()  # the base itself: a change of nothing

    def _copy_full(self, name: str, source: Tensor) -> None:
        """Fill a copy; one whose network still lies in its files would be filled from there, whatever is put in it."""
        owner, _, last = name.rpartition(".")
        module = self.student.get_submodule(owner)
        weight = module.get_parameter(last)
        if weight.is_meta and not source.is_meta:
            setattr(module, last, nn.Parameter(source.detach().to(weight.dtype, copy=True), weight.requires_grad))
        else:
            weight.copy_(source)

    def _pinned_checkpoint(self, block: Callable[..., Any], *arguments: Any) -> Any:
        """Checkpoint a block, or another part of the network, so that its second run sees the adapter of the first."""
        adapter, layers = self._speaking, _adapted_layers(block) if isinstance(block, nn.Module) else self._layers

        def run(*inputs: Any) -> Any:
            with _speaking(layers, adapter):
                return block(*inputs)

        return self._checkpoint(run, *arguments)


def bind(
    ask: Ask, conditions: Callable[[Tensor], Conditions], **view: Any
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The seam ``u(z, t, r, rows)`` of a network or one of its roles.

    ``conditions`` are those of given rows of a batch; ``view`` is what more the network is asked for (its layout).
    """

    def velocity(z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        return ask(z, t, r, conditions(rows), **view)

    return velocity


def _adapted_layers(module: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer | FullModule)]


def _adapter_of(name: str) -> str | None:
    """The adapter that a weight belongs to (``...to_q.lora_A.critic.weight``), None for the base's."""
    return name.split(".lora_")[1].split(".")[1] if ".lora_" in name else None


@contextmanager
def _speaking(layers: Sequence[Any], adapter: str | None) -> Iterator[None]:
    """Within the block the layers apply one adapter (None: the base alone); ``requires_grad`` is not touched."""
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter = layer._active_adapter if adapter is None else [adapter]
        layer._disable_adapters = adapter is None
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
