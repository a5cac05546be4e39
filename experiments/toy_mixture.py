"""Any-step generation in two dimensions: what the flow-map objective does, in about a minute on one core.

    python experiments/toy_mixture.py --out experiments/toy

Two small networks learn the same ring of eight Gaussians: one by the flow-map objective (`anyflow.flowmap`), one by
plain flow matching. Both are sampled at 1 to 32 steps from the same noise and compared with fresh data by the sliced
Wasserstein distance. Writes `toy_mixture.png` (the samples and the curve) and `toy_mixture.json` (the figures).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from anyflow.flowmap import (
    FlowMapObjective,
    diffusion_statistics,
    draw_intervals,
    flow_map_loss,
    flow_matching_loss,
    rebalance,
    sample,
)

NUM_STEPS = (1, 2, 4, 8, 16, 32)
SHIFT = 1.0
BATCH = 512
NUM_SAMPLES = 4096


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


def train(method: str, num_updates: int, seed: int) -> MeanVelocity:
    """Train one network, ``flow map`` or ``flow matching``, and return the average of its weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network, average = MeanVelocity(), MeanVelocity()
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates, eta_min=2e-5)
    objective = FlowMapObjective(guidance_scale=1.0, shift=SHIFT)
    rows = torch.arange(BATCH)
    for update in range(num_updates):
        clean, noise = draw_ring(BATCH, generator), torch.randn(BATCH, 2, generator=generator)
        intervals = draw_intervals(torch.rand(BATCH, 2, generator=generator), 0.5, 0.25, SHIFT)
        if method == "flow map":
            found = flow_map_loss(objective, network, clean, noise, intervals.timestep, intervals.r_timestep, rows)
            total, count = diffusion_statistics(found.per_sample, found.is_diffusion)
            loss = rebalance(found.per_sample, found.is_diffusion, total / count).mean()
        else:
            loss = flow_matching_loss(network, clean, noise, intervals.timestep, rows).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), network.parameters(), strict=True):
                old.lerp_(new, max(0.005, 1 / (update + 1)))
    return average


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
        return network(z, t, r if method == "flow map" else t)

    return {num_steps: sample(velocity, noise, num_steps, SHIFT) for num_steps in NUM_STEPS}


def run(num_updates: int, seed: int, methods: tuple[str, ...] = ("flow map", "flow matching")) -> tuple[dict, dict]:
    """Train and sample each method; return its clouds and its distances by number of steps (and the data's own)."""
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(NUM_SAMPLES, 2, generator=generator)
    truth, again = draw_ring(NUM_SAMPLES, generator), draw_ring(NUM_SAMPLES, generator)
    clouds: dict[str, dict[int, Tensor]] = {}
    curves: dict[str, dict[int, float]] = {"data": dict.fromkeys(NUM_STEPS, sliced_wasserstein(again, truth))}
    for method in methods:
        clouds[method] = any_step_samples(method, train(method, num_updates, seed), noise)
        curves[method] = {steps: sliced_wasserstein(cloud, truth) for steps, cloud in clouds[method].items()}
    return clouds, curves


def plot(clouds: dict[str, dict[int, Tensor]], curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the samples, a row a method, above the distance against the number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 8), layout="constrained")
    grid = figure.add_gridspec(len(clouds) + 1, len(NUM_STEPS), height_ratios=[1] * len(clouds) + [1.5])
    for row, (method, by_steps) in enumerate(clouds.items()):
        for column, (num_steps, cloud) in enumerate(by_steps.items()):
            axes = figure.add_subplot(grid[row, column])
            axes.scatter(cloud[:2000, 0], cloud[:2000, 1], s=1, alpha=0.5, color=f"C{row}")
            axes.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[], aspect="equal")
            axes.set_title(f"{method}, {num_steps} step{'s' if num_steps > 1 else ''}", fontsize=9)
    axes = figure.add_subplot(grid[-1, :])
    for row, method in enumerate(clouds):
        axes.plot(NUM_STEPS, list(curves[method].values()), marker="o", color=f"C{row}", label=method)
    axes.axhline(curves["data"][1], linestyle=":", color="grey", label="data against data")
    axes.set(xscale="log", yscale="log", xlabel="steps (network calls)", ylabel="sliced Wasserstein distance to data")
    axes.set_xticks(NUM_STEPS, [str(steps) for steps in NUM_STEPS])
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="training updates a method (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, noise and weights (default 0)")
    parser.add_argument("--out", type=Path, default=Path("experiments/toy"), help="folder for the plot and the figures")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; train for at least 1 update")
    torch.set_num_threads(1)
    started = time.perf_counter()
    clouds, curves = run(arguments.steps, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(clouds, curves, arguments.out / "toy_mixture.png")
    (arguments.out / "toy_mixture.json").write_text(json.dumps(curves, indent=1))
    print(f"sliced Wasserstein distance to the data, after {time.perf_counter() - started:.0f} s")
    print(f"{'steps':>14}" + "".join(f"{steps:>8}" for steps in NUM_STEPS))
    for method, curve in curves.items():
        print(f"{method:>14}" + "".join(f"{distance:8.3f}" for distance in curve.values()))
    print(f"plot: {arguments.out / 'toy_mixture.png'}")


if __name__ == "__main__":
    main()
