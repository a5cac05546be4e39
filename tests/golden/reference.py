"""Loading the golden cases, and a velocity over their network."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).parent
NEGATIVE = 4
"""The row of the negative prompt, and of all after it: the cases have four samples."""


def load_case(name: str) -> dict[str, Tensor]:
    """Return the tensors of one case."""
    return load_file(HERE / f"{name}.safetensors")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the L2 distance over the L2 norm of what was expected, in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


class GoldenVelocity(nn.Module):
    """The velocity seam over diffusers' own network with the golden weights; records the size and times of each call.

    The teacher's and the critic's weights are of a network with one time; the second embedder becomes a copy.
    """

    def __init__(self, weights: str = "weights_student_bi") -> None:
        super().__init__()
        from diffusers import AnyFlowTransformer3DModel

        stored = json.loads((HERE / "weights.json").read_text())
        taken = inspect.signature(AnyFlowTransformer3DModel.__init__).parameters
        config = {key: value for key, value in stored["reference_config"].items() if key in taken}
        self.network = AnyFlowTransformer3DModel(
            **config, gate_value=stored["gate_value"], deltatime_type=stored["deltatime_type"]
        )
        state = load_case(weights)
        time, delta = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."
        copies = {name.replace(time, delta): weight.clone() for name, weight in state.items() if name.startswith(time)}
        self.network.load_state_dict({**copies, **state})
        inputs = load_case("inputs_bi")
        self.texts: Tensor
        self.register_buffer("texts", torch.cat([inputs["in/prompt_embeds"], inputs["in/negative_embedding"]]))
        self.clean = inputs["in/latents"].transpose(1, 2)
        self.calls: list[int] = []
        self.times: list[tuple[float, float]] = []

    def forward(self, z: Tensor, t: Tensor, r: Tensor, rows: Tensor) -> Tensor:
        self.calls.append(len(z))
        self.times.append((float(t.flatten()[0]), float(r.flatten()[0])))
        t, r = (time if time.ndim == 2 else time[:, None].expand(-1, z.shape[1]) for time in (t, r))
        return self.network(z, t, r, self.texts[rows.clamp(max=NEGATIVE)], return_dict=False)[0]

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients, in float64."""
        return sum(weight.grad.double().square().sum() for weight in self.network.parameters()).sqrt()  # type: ignore
