"""A forward-training step against the plain order of work, both in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from experiments.bench.compare import compare, gains

if TYPE_CHECKING:
    from torch import Tensor

    from anyflow.flowmap.objective import FlowMapLoss


def step_benchmark(
    *,
    batch_size: int = 16,
    padded_length: int = 512,
    size: tuple[int, int, int] = (5, 8, 12),
    repeats: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """A training step of the embedded network, two ways, at the same weights, draws and texts.

    - ``plain``: the published order of work: every pass for every sample, one after another, the modulation repeated to
      every token, through diffusers' own forward.
    - ``anyflow``: what the stages do.

    Args:
        batch_size: clips.
        padded_length: tokens that prompts are padded to: 512 in the published pipelines. 0 leaves padding out of the
            comparison: prompts of one length, so what is left is the order of work and the modulation.
        size: frames, rows and columns of the latents.
        repeats: timed steps of each way, taken in turn so that a slow spell of the machine hits all; medians count.
        seed: of weights and draws.

    Returns:
        Per way ``seconds``, ``peak_bytes`` (tensors allocated in one step beyond the weights) and ``loss``; the largest
        relative difference of the losses; ``speedup`` and ``memory_ratio`` of plain to anyflow.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = _ways(batch_size, padded_length, size, seed, device)
    losses = {name: float(step().per_sample.detach().mean()) for name, step in ways.items()}
    costs = compare(ways, repeats, device)
    spread = max(abs(loss - losses["anyflow"]) for loss in losses.values()) / abs(losses["anyflow"])
    return {
        "ways": {name: {**cost, "loss": losses[name]} for name, cost in costs.items()},
        "loss_difference": spread,
        **gains(costs["anyflow"], costs["plain"]),
        "batch_size": batch_size,
        "padded_length": padded_length,
        "device": device,
    }


def _ways(
    batch_size: int, padded_length: int, size: tuple[int, int, int], seed: int, device: str
) -> dict[str, Callable[[], FlowMapLoss]]:
    """The two steps: loss, balance, gradients."""
    import torch
    from diffusers import AnyFlowTransformer3DModel

    from anyflow.backbone.conditions import Conditions
    from anyflow.backbone.embedded import SHIFT, transformer_config
    from anyflow.backbone.load import new_backbone
    from anyflow.flowmap.intervals import draw_intervals
    from anyflow.flowmap.objective import FlowMapObjective, flow_map_loss, plain_flow_map_loss, rebalance

    backbone = new_backbone(transformer_config(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # a new network's last layer is zero, and its losses would agree whatever went wrong
        for weight in backbone.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    backbone.to(device)
    stock = AnyFlowTransformer3DModel.from_config(backbone.transformer.config).to(device)
    stock.load_state_dict(backbone.transformer.state_dict())
    frames, height, width = size
    shape = (batch_size, frames, stock.config.in_channels, height, width)
    clean, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    drawn = draw_intervals(torch.rand(batch_size, 2, generator=generator), shift=SHIFT).to(device)
    dropped = torch.rand(batch_size, generator=generator) < 0.1
    rows = (torch.arange(batch_size) + batch_size * dropped).to(device)
    text, padded = _texts(batch_size, padded_length, stock.config.text_dim, generator, device)

    def ours(z: Tensor, t: Tensor, r: Tensor, which: Tensor) -> Tensor:
        return backbone(z, t, r, Conditions(text.select(which.clamp(max=batch_size))))

    def published(z: Tensor, t: Tensor, r: Tensor, which: Tensor) -> Tensor:
        times = (time[:, None].expand(-1, frames) for time in (t, r))
        return stock(z, *times, padded[which.clamp(max=batch_size)], return_dict=False)[0]

    objective = FlowMapObjective(shift=SHIFT)

    def way(network: Any, loss_function: Any, velocity: Any) -> Callable[[], FlowMapLoss]:
        def step() -> FlowMapLoss:
            loss = loss_function(objective, velocity, clean, noise, drawn.timestep, drawn.r_timestep, rows)
            mean = loss.per_sample.detach()[loss.is_diffusion].mean()
            rebalance(loss.per_sample, loss.is_diffusion, mean).mean().backward()
            network.zero_grad(set_to_none=True)
            return loss

        return step

    return {
        "plain": way(stock, plain_flow_map_loss, published),
        "anyflow": way(backbone, flow_map_loss, ours),
    }


def _texts(batch_size: int, padded_length: int, width: int, generator: Any, device: str) -> tuple[Any, Tensor]:
    """Random embeddings of short prompts (and an empty one, the negative): folded for us, padded for the stock forward.

    Without padding all have 28 tokens, and both are the same.
    """
    import torch

    from anyflow.backbone.conditions import Text

    if not padded_length:
        whole = torch.randn(batch_size + 1, 28, width, generator=generator)
        return Text(whole, None, 28).to(device), whole.to(device)
    lengths = torch.randint(12, 28, (batch_size + 1,), generator=generator)
    lengths[-1] = 1
    padded = torch.randn(batch_size + 1, padded_length, width, generator=generator)
    padded *= (torch.arange(padded_length) < lengths[:, None])[..., None]
    longest = int(lengths.max()) + 1
    return Text(padded[:, :longest], lengths, padded_length).to(device), padded.to(device)
