"""Flow-map backward simulation: what an N-step sampler would have made, in at most three network calls (sec. 4).

On-policy distillation trains a network on its own samples. Simulating the ``N`` Euler steps that led to a sample costs
``N`` calls with their gradients; the flow map reaches the same point in one jump. So of a drawn budget ``N`` and step
``g``, only step ``g`` is taken as it stands, and what comes before and after it is one jump each:
``tau_0 -> tau_g -> tau_{g+1} -> tau_N``. The gradient flows through all three, and what comes out is a clean latent.
A network that goes chunk by chunk takes these jumps in every chunk (:func:`anyflow.flowmap.sampling.follow_chunks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from anyflow.flowmap.sampling import BoundVelocity, Jump, follow
from anyflow.flowmap.schedule import inference_timesteps

RELEASED_BUDGETS = (2, 4, 8, 16, 50)
"""The released runs' step budgets; without 1 among them, quality at one step falls."""

DEFAULT_BUDGETS = (1, *RELEASED_BUDGETS)


@dataclass(frozen=True)
class BackwardSimulation:
    """Which sampler is simulated, and which of its steps is taken as it stands.

    Attributes:
        num_steps: N, the sampler's number of steps.
        index: g in 0..N-1.
        shift: of the sampler's schedule.

    Raises:
        ValueError: there is no such step.
    """

    num_steps: int
    index: int
    shift: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num_steps:
            raise ValueError(f"index is {self.index}; a sampler of {self.num_steps} steps has 0..{self.num_steps - 1}")

    @property
    def jumps(self) -> list[Jump]:
        """The one to three jumps, from timestep 1000 to 0; empty ones (before the first step, after the last) left out.

        They share their ends exactly, so together they span the whole path.
        """
        schedule = inference_timesteps(self.num_steps, self.shift).tolist()
        ends = sorted({0, self.index, self.index + 1, self.num_steps})
        return [(schedule[start], schedule[end]) for start, end in pairwise(ends)]

    def run(self, velocity: BoundVelocity, noise: Tensor, first_frames: Tensor | None = None) -> Tensor:
        """The clean latents that come out of ``noise [B, F, C, H, W]``, with the graph of every jump.

        ``first_frames`` are given clean latents, as in :func:`anyflow.flowmap.sampling.follow`.
        """
        return follow(velocity, noise, self.jumps, first_frames=first_frames)


class RenoisingSimulation(BackwardSimulation):
    """A sampler that noises afresh (:class:`~anyflow.flowmap.endpoint.Renoise`), stopped at its drawn step.

    No jump leads over several of its steps, so the first ones are taken as they are, and the drawn one's answer is the
    sample: trained on samples of all steps, the network learns each of them.
    """

    @property
    def jumps(self) -> list[Jump]:
        """The first steps, and a last one to the data."""
        schedule = inference_timesteps(self.num_steps, self.shift).tolist()
        return list(pairwise([*schedule[: self.index + 1], 0.0]))


def draw_simulation(
    uniforms: Tensor, budgets: Sequence[int] = DEFAULT_BUDGETS, shift: float = 5.0
) -> BackwardSimulation:
    """Turn two uniforms ``[2]`` in [0, 1) into a budget out of the list and a step of it, each equally likely.

    Every rank must pass the same uniforms: the number of network calls depends on them.

    Raises:
        ValueError: no budgets, or one below 1.
    """
    if not budgets or min(budgets) < 1:
        raise ValueError(f"budgets are {list(budgets)}; give step counts of at least 1")
    first, second = uniforms.double().tolist()
    num_steps = budgets[int(first * len(budgets))]
    return BackwardSimulation(num_steps, int(second * num_steps), shift)
