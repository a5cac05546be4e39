"""Any-step generation in two dimensions: what each way of training gives at 1 to 32 steps, in minutes on one core.

    python experiments/toy_mixture.py --out experiments/toy --seeds 3

Four ways to learn the same ring of eight Gaussians, all by :mod:`anyflow.flowmap`:

``flow matching``
    the instantaneous velocity alone, sampled by Euler steps; it is also the teacher of the on-policy methods.
``flow map``
    the forward objective: mean velocities learnt from data.
``flow map + on-policy``
    from the flow map: distribution matching on its own simulated samples, the forward objective beside it.
``on-policy without co-training``
    the same without the forward objective.

All are sampled from the same noise and compared with fresh data by the sliced Wasserstein distance. Writes
`toy_mixture.png` (the first seed's samples, and the curves) and `toy_mixture.json` (the figures: mean and standard
deviation over the seeds, and each seed's).

Settings. The first two: 4000 updates of Adam, 2e-3 decaying to 2e-5 by a cosine. On-policy: 1000 updates at constant
rates, student 2e-5 and critic 5e-4, betas (0, 0.999), one critic step a student step; student from the flow map,
teacher and critic from flow matching, no guidance (there is no text). Batch 512, clip 1, samples by averaged weights.
The student's rate is the one of 1e-5 to 5e-4 that is best with co-training (mean over the step counts, a seed of its
own: 100); without, 1e-5 would be a little better (.054 against .058). The critic's, 5e-4 or 2e-3, hardly matters.

Read the spread before the means: of seeds 0, 1 and 2, seed 1 gives a flow map three times worse at one step, and every
method that starts from it inherits that. All the on-policy methods start from the same flow map of their seed, so each
seed's own figures, in the json, compare them better than the means.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anyflow.flowmap.intervals import draw_intervals
from anyflow.flowmap.matching import critic_loss, matching_gradient, matching_loss, matching_timestep
from anyflow.flowmap.objective import (
    FlowMapObjective,
    diffusion_statistics,
    flow_map_loss,
    flow_matching_loss,
    rebalance,
)
from anyflow.flowmap.rollout import draw_simulation
from anyflow.flowmap.sampling import sample
from anyflow.flowmap.schedule import logit_normal_timestep

METHODS = ("flow matching", "flow map", "flow map + on-policy", "on-policy without co-training")
NUM_STEPS = (1, 2, 4, 8, 16, 32)
SHIFT = 1.0
BATCH = 512
NUM_SAMPLES = 4096
ROWS = torch.arange(BATCH)
OBJECTIVE = FlowMapObjective(guidance_scale=1.0, shift=SHIFT)

Curve = dict[int, float]
"""The distance to the data by number of steps."""


def draw_ring(count: int, generator: torch.Generator) -> Tensor:
    """Points ``[count, 2]`` of eight narrow Gaussians on a circle, about unit variance a coordinate."""
    angle = torch.randint(8, (count,), generator=generator) * (2 * math.pi / 8)
    centre = 1.4 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.12 * torch.randn(count, 2, generator=generator)


class MeanVelocity(nn.Module):
    """A small network u(z, t, r): times enter as waves, slow enough for the finite difference to see them smooth."""

    def __init__(self, width: int = 128, waves: int = 4) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(waves) / 2000)
        self.layers = nn.Sequential(
            nn.Linear(2 + 4 * waves, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, z: Tensor, t: Tensor, r: Tensor, rows: Tensor | None = None) -> Tensor:
        phase = torch.cat([t[:, None] * self.frequencies, r[:, None] * self.frequencies], dim=1)
        return self.layers(torch.cat([z, phase.sin(), phase.cos()], dim=1))


@dataclass(frozen=True)
class Rates:
    """How the on-policy methods learn: updates, and the learning rates of student and critic."""

    num_updates: int = 1000
    student: float = 2e-5
    critic: float = 5e-4


DEFAULT_RATES = Rates()


class Learner:
    """A network, a copy of the one given, with its Adam and the running average of its weights."""

    def __init__(self, start: MeanVelocity, rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.network, self.average = copy.deepcopy(start), copy.deepcopy(start)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=rate, betas=betas)
        self.num_updates = 0

    def descend(self, loss: Tensor) -> None:
        """One update; early on, the average is over the few updates that there were."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.num_updates += 1
        with torch.no_grad():
            for old, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                old.lerp_(new, max(0.005, 1 / self.num_updates))


def forward_loss(network: MeanVelocity, generator: torch.Generator, is_flow_map: bool = True) -> Tensor:
    """The loss on a fresh batch of data: the rebalanced flow-map objective, or plain flow matching."""
    clean, noise = draw_ring(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
    intervals = draw_intervals(torch.rand(BATCH, 2, generator=generator), shift=SHIFT)
    if not is_flow_map:
        return flow_matching_loss(network, clean, noise, intervals.timestep, ROWS).mean()
    found = flow_map_loss(OBJECTIVE, network, clean, noise, intervals.timestep, intervals.r_timestep, ROWS)
    total, count = diffusion_statistics(found.per_sample, found.is_diffusion)
    return rebalance(found.per_sample, found.is_diffusion, total / count).mean()


def train_on_data(is_flow_map: bool, num_updates: int, seed: int) -> MeanVelocity:
    """Train a network from nothing by the flow-map objective or by flow matching; its averaged weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    learner = Learner(MeanVelocity(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(learner.optimizer, num_updates, eta_min=2e-5)
    for _ in range(num_updates):
        learner.descend(forward_loss(learner.network, generator, is_flow_map))
        schedule.step()
    return learner.average


def train_on_policy(
    flow_map: MeanVelocity, teacher: MeanVelocity, co_training: bool, rates: Rates, seed: int
) -> MeanVelocity:
    """Distil the teacher into a flow map on the map's own samples; its averaged weights."""
    generator = torch.Generator().manual_seed(seed)
    student = Learner(flow_map, rates.student, betas=(0.0, 0.999))
    critic = Learner(teacher, rates.critic, betas=(0.0, 0.999))
    for _ in range(rates.num_updates):
        loss = on_policy_loss(student.network, critic.network, teacher, generator)
        if co_training:
            loss = loss + forward_loss(student.network, generator)
        student.descend(loss)
        with torch.no_grad():
            samples = simulate(student.network, generator)
        timestep = logit_normal_timestep(torch.randn(BATCH, generator=generator), SHIFT)
        noise = torch.randn(BATCH, 2, generator=generator)
        critic.descend(critic_loss(critic.network, samples, noise, timestep, ROWS).mean())
    return student.average


def on_policy_loss(
    student: MeanVelocity, critic: MeanVelocity, teacher: MeanVelocity, generator: torch.Generator
) -> Tensor:
    """Distribution matching on a fresh batch of the student's samples."""
    samples = simulate(student, generator)
    noise = torch.randn(BATCH, 2, generator=generator)
    timestep = matching_timestep(torch.rand(BATCH, generator=generator), SHIFT)
    found = matching_gradient(critic, teacher, samples, noise, timestep, ROWS, extra_guidance=0.0)
    return matching_loss(samples, found.gradient).mean()


def simulate(network: MeanVelocity, generator: torch.Generator) -> Tensor:
    """Samples ``[BATCH, 2]`` of a drawn sampler in at most three calls, with their graph."""
    plan = draw_simulation(torch.rand(2, generator=generator), shift=SHIFT)
    return plan.run(network, torch.randn(BATCH, 2, generator=generator))


def train_all(num_updates: int, rates: Rates, seed: int) -> dict[str, MeanVelocity]:
    """The network of each method; the on-policy ones begin where the first two end."""
    matching, flow_map, with_data, alone = METHODS
    networks = {name: train_on_data(name == flow_map, num_updates, seed) for name in (matching, flow_map)}
    for name in (with_data, alone):
        networks[name] = train_on_policy(networks[flow_map], networks[matching], name == with_data, rates, seed)
    return networks


def sliced_wasserstein(first: Tensor, second: Tensor, num_directions: int = 64) -> float:
    """The Wasserstein-1 distance of two clouds ``[n, 2]`` averaged over evenly spread directions."""
    angle = torch.arange(num_directions) * (math.pi / num_directions)
    directions = torch.stack([angle.cos(), angle.sin()])
    return ((first @ directions).sort(dim=0).values - (second @ directions).sort(dim=0).values).abs().mean().item()


def any_step_samples(method: str, network: MeanVelocity, noise: Tensor) -> dict[int, Tensor]:
    """The samples of a network at every number of steps, from the same noise.

    A flow map is asked for the mean velocity of each jump; flow matching knows only the velocity where it stands.
    """

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(z, t, t if method == "flow matching" else r)

    return {num_steps: sample(velocity, noise, num_steps, SHIFT) for num_steps in NUM_STEPS}


def run(
    num_updates: int, seed: int, rates: Rates = DEFAULT_RATES
) -> tuple[dict[str, dict[int, Tensor]], dict[str, Curve]]:
    """Train and sample each method; return its clouds and its curve (and the data's own distance to itself)."""
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(NUM_SAMPLES, 2, generator=generator)
    truth, again = draw_ring(NUM_SAMPLES, generator), draw_ring(NUM_SAMPLES, generator)
    networks = train_all(num_updates, rates, seed)
    clouds = {method: any_step_samples(method, network, noise) for method, network in networks.items()}
    curves: dict[str, Curve] = {"data": dict.fromkeys(NUM_STEPS, sliced_wasserstein(again, truth))}
    for method, by_steps in clouds.items():
        curves[method] = {steps: sliced_wasserstein(cloud, truth) for steps, cloud in by_steps.items()}
    return clouds, curves


@dataclass(frozen=True)
class Figure:
    """One distance over the seeds; the standard deviation of one seed is 0."""

    mean: float
    std: float
    each: list[float]

    @classmethod
    def of(cls, each: list[float]) -> Figure:
        return cls(statistics.fmean(each), statistics.stdev(each) if len(each) > 1 else 0.0, each)


Figures = dict[str, dict[int, Figure]]


def summarise(seeds: Sequence[dict[str, Curve]]) -> Figures:
    """Mean and spread of each method at each number of steps."""
    return {
        method: {steps: Figure.of([curves[method][steps] for curves in seeds]) for steps in NUM_STEPS}
        for method in seeds[0]
    }


def table(figures: Figures) -> str:
    """The figures as text, a line a method: the mean, and the standard deviation where there is one."""

    def cell(figure: Figure) -> str:
        return f"{figure.mean:.3f}" + (f" ±{figure.std:.3f}" if len(figure.each) > 1 else "")

    rows = [("steps", [str(steps) for steps in NUM_STEPS])]
    rows += [(method, [cell(figure) for figure in by_steps.values()]) for method, by_steps in figures.items()]
    return "\n".join(f"{name:>29}" + "".join(f"{text:>14}" for text in cells) for name, cells in rows)


def plot(clouds: dict[str, dict[int, Tensor]], figures: Figures, path: Path) -> None:
    """Draw the samples, a row a method, above the distance against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 14), layout="constrained")
    grid = figure.add_gridspec(len(clouds) + 1, len(NUM_STEPS), height_ratios=[1] * len(clouds) + [1.8])
    for row, (method, by_steps) in enumerate(clouds.items()):
        for column, (num_steps, cloud) in enumerate(by_steps.items()):
            axes = figure.add_subplot(grid[row, column])
            axes.scatter(cloud[:2000, 0], cloud[:2000, 1], s=1, alpha=0.5, color=f"C{row}")
            axes.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"{method}\n{num_steps} step{'s' if num_steps > 1 else ''}", fontsize=8)
    axes = figure.add_subplot(grid[-1, :])
    for row, method in enumerate(clouds):
        found = figures[method].values()
        means, spreads = [one.mean for one in found], [one.std for one in found]
        axes.errorbar(NUM_STEPS, means, yerr=spreads, marker="o", capsize=3, color=f"C{row}", label=method)
    axes.axhline(figures["data"][1].mean, linestyle=":", color="grey", label="data against data")
    axes.set(xscale="log", yscale="log", xlabel="steps (network calls)", ylabel="sliced Wasserstein distance to data")
    axes.set_xticks(NUM_STEPS, [str(steps) for steps in NUM_STEPS])
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="training updates a method on data (default 4000)")
    parser.add_argument("--onpolicy-steps", type=int, default=1000, help="on-policy updates after them (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of data, noise and weights (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, for the spread (default 1)")
    parser.add_argument("--out", type=Path, default=Path("experiments/toy"), help="folder for the plot and the figures")
    arguments = parser.parse_args(argv)
    for name in ("steps", "onpolicy_steps", "seeds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)
    started = time.perf_counter()
    rates = Rates(num_updates=arguments.onpolicy_steps)
    found = [run(arguments.steps, arguments.seed + more, rates) for more in range(arguments.seeds)]
    figures = summarise([curves for _, curves in found])
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(found[0][0], figures, arguments.out / "toy_mixture.png")
    as_json = {method: {steps: vars(one) for steps, one in by_steps.items()} for method, by_steps in figures.items()}
    (arguments.out / "toy_mixture.json").write_text(json.dumps(as_json, indent=1))
    print(f"sliced Wasserstein distance to the data, {arguments.seeds} seed(s), {time.perf_counter() - started:.0f} s")
    print(table(figures))
    print(f"plot: {arguments.out / 'toy_mixture.png'}")


if __name__ == "__main__":
    main()
