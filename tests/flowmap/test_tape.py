"""A tape's gradient is the whole graph's, whatever is kept; and it keeps the graph of one jump at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow.flowmap.rollout import BackwardSimulation
from anyflow.flowmap.sampling import follow, follow_chunks
from anyflow.flowmap.tape import Tape

JUMPS = BackwardSimulation(8, 3).jumps


class Net(torch.nn.Module):
    """A small velocity; counts its passes, and the graphs that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = torch.nn.Linear(5, 16).double(), torch.nn.Linear(16, 4).double()
        self.passes = 0

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        self.passes += 1
        times = (t - r)[:, None, None] / 1000 if t.ndim == 1 else (t - r)[..., None] / 1000
        return self.outer(torch.tanh(self.inner(torch.cat([z, times.expand(*z.shape[:2], 1).to(z)], dim=2))))


def gradients(
    limit: int | None, given: bool = False, chunks: tuple[int, ...] | None = None
) -> tuple[list[Tensor], int]:
    net, tape = Net(), Tape(limit)
    generator = torch.Generator().manual_seed(1)
    noise, probe = torch.randn(2, 2, 6, 4, generator=generator, dtype=torch.float64)
    first_frames = noise[:, :1] * 0.5 if given else None
    if chunks is None:
        samples = follow(net, noise, JUMPS, first_frames=first_frames, take=tape.take)
    else:

        def after(clean: Tensor, done: object) -> object:
            shift = clean.mean(dim=1, keepdim=True) if clean.shape[1] else 0.0
            return lambda z, t, r: net(z + shift, t, r)

        samples = torch.cat(list(follow_chunks(after, noise, JUMPS, chunks, take=tape.take)), dim=1)  # type: ignore[arg-type]
    (samples * probe).square().sum().backward()
    tape.backward(lambda end, gradient: end.backward(gradient))
    return [weight.grad for weight in net.parameters()], net.passes  # type: ignore[misc]


@pytest.mark.parametrize("chunks", [None, (1, 2, 3)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_gradient_is_that_of_the_whole_graph(
    limit: int | None, given: bool, chunks: tuple[int, ...] | None
) -> None:
    whole, passes = gradients(0, given, chunks)
    taped, more = gradients(limit, given, chunks)
    for expected, found in zip(whole, taped, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert more - passes == (passes if limit is None else limit), "a second pass for every noted jump"


def test_without_gradient_nothing_is_noted() -> None:
    net, tape = Net(), Tape()
    with torch.no_grad():
        samples = follow(net, torch.zeros(1, 2, 4, dtype=torch.float64), JUMPS, take=tape.take)
    tape.backward(lambda end, gradient: pytest.fail("there is nothing to pull"))
    assert not samples.requires_grad and net.passes == len(JUMPS)


def test_one_graph_is_alive_at_a_time() -> None:
    """Saved tensors of the network, counted while they are held."""
    held, most = 0, 0

    def pack(tensor: Tensor) -> object:
        nonlocal held, most

        class Saved:
            def __init__(self) -> None:
                nonlocal held, most
                held += 1
                most = max(most, held)
                self.tensor = tensor

            def __del__(self) -> None:
                nonlocal held
                held -= 1

        return Saved()

    counts = []
    for limit in (0, len(JUMPS) - 1):
        held = most = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            gradients(limit)
        counts.append(most)
    assert counts[1] < 0.5 * counts[0]
