"""Chunks: every video is divided, layouts are what was drawn, a pass lays frames out in order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anyflow.flowmap.chunks import ChunkLayout, PathBatch, draw_layout, in_chunks, layout_of, partition_frames
from anyflow.flowmap.sampling import follow, follow_chunks

RELEASED = (1, 3, 3, 3, 3, 3, 3, 2)


def test_the_released_partition() -> None:
    assert partition_frames(21, RELEASED) == RELEASED
    assert partition_frames(5, (1, 2, 2)) == (1, 2, 2)
    assert partition_frames(24, RELEASED) == (1, 3, 3, 3, 3, 3, 3, 3, 2)
    assert partition_frames(5, RELEASED) == (1, 3, 1)
    assert partition_frames(1, RELEASED) == (1,)
    assert partition_frames(6, RELEASED, num_given=2) == (1, 1, 2, 2)
    assert partition_frames(6, RELEASED, num_given=4) == (1, 3, 2)


@given(
    st.integers(1, 60),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(0, 60),
)
def test_any_number_of_frames_is_divided(num_frames: int, pattern: list[int], num_given: int) -> None:
    num_given = min(num_given, num_frames)
    chunks = partition_frames(num_frames, pattern, num_given)
    assert sum(chunks) == num_frames and min(chunks) >= 1 and max(chunks) <= max(pattern)
    assert num_given in [sum(chunks[:done]) for done in range(len(chunks) + 1)]


@pytest.mark.parametrize("bad", [(0, (1, 2), 0), (3, (), 0), (3, (1, 0), 0), (3, (1, 2), 4)])
def test_what_cannot_be_divided_is_refused(bad: tuple[int, tuple[int, ...], int]) -> None:
    with pytest.raises(ValueError):
        partition_frames(*bad)


def test_old_chunks_are_compressed() -> None:
    assert layout_of((1, 2, 2, 1), 3) == ChunkLayout((1,), (2, 2, 1))
    assert layout_of((1, 2), 3) == ChunkLayout((), (1, 2))
    assert layout_of((1, 2), 0, noisy=False) == ChunkLayout((1, 2), (), noisy=False)
    assert layout_of((1, 2, 2, 1), 3).num_frames == 1 + 2 * 5


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(1, 9))
def test_a_drawn_layout_trains_the_last_chunks_of_a_prefix(choice: float, length: float, chunks: int) -> None:
    partition = RELEASED[:chunks]
    layout = draw_layout(torch.tensor([choice, length], dtype=torch.float64), partition, 3, 0.5)
    prefix = (*layout.compressed, *layout.full)
    assert prefix == partition[: len(prefix)] and len(layout.full) == min(3, len(partition))
    assert bool(layout.compressed) == (choice < 0.5 and len(partition) > 3)


def test_all_lengths_are_drawn_equally_often() -> None:
    uniforms = torch.stack([torch.zeros(500), torch.arange(500) / 500], dim=1)
    lengths = [len(draw_layout(pair, RELEASED, 3, 0.5).compressed) for pair in uniforms]
    assert [lengths.count(number) for number in range(1, 6)] == [100] * 5


def lesson_of(loss_frames: Tensor | None = None, frames: int = 6) -> PathBatch:
    clean = torch.arange(frames, dtype=torch.float32).reshape(1, frames, 1, 1, 1).expand(2, -1, 3, 2, 2)
    return PathBatch(clean, -clean - 1, torch.tensor([900.0, 500.0]), torch.tensor([100.0, 0.0]), loss_frames)


def test_a_lesson_is_context_then_noisy_then_copies() -> None:
    on_path = in_chunks(layout_of((1, 2, 1), 2), lesson_of())
    assert on_path.clean[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 1, 2, 3]
    assert on_path.noise[0, :, 0, 0, 0].tolist() == [-1, -2, -3, -4, -2, -3, -4]
    assert on_path.timestep.tolist() == [[0, 900, 900, 900, 0, 0, 0], [0, 500, 500, 500, 0, 0, 0]]
    assert on_path.r_timestep[0].tolist() == [0, 100, 100, 100, 0, 0, 0]
    assert on_path.loss_frames is not None
    assert on_path.loss_frames.tolist() == [[False, True, True, True, False, False, False]] * 2


def test_given_frames_stay_given_in_a_lesson() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 0] = False
    given = lesson_of(mask)
    times = torch.full((2, 6), 700.0).masked_fill(~mask, 0)
    on_path = in_chunks(layout_of((1, 2), 3), PathBatch(given.clean, given.noise, times, times, mask))
    assert on_path.timestep[0].tolist() == [0, 700, 700, 0, 0, 0]
    assert on_path.loss_frames is not None
    assert on_path.loss_frames[0].tolist() == [False, True, True, False, False, False]


def test_chunks_follow_one_another_from_their_own_noise() -> None:
    """A field that carries each chunk to its predecessors' sum: the result tells who saw what."""
    noise = torch.randn(2, 6, 3, 2, 2)
    seen: list[tuple[int, tuple[int, ...], bool]] = []

    def after(clean: Tensor, chunks: tuple[int, ...]):  # type: ignore[no-untyped-def]
        seen.append((clean.shape[1], tuple(chunks), clean.requires_grad))
        goal = 1 + clean.sum(dim=1, keepdim=True)
        return lambda z, t, r: (z - goal) / (t / 1000)[:, None, None, None, None]

    noise.requires_grad_()
    parts = list(follow_chunks(after, noise, [(1000.0, 400.0), (400.0, 0.0)], (1, 2, 2, 1)))
    assert seen == [(0, (), False), (1, (1,), False), (3, (1, 2), False), (5, (1, 2, 2), False)]
    for part, value in zip(parts, (1, 2, 6, 18), strict=True):
        torch.testing.assert_close(part, torch.full_like(part, value))


def test_a_long_video_forgets_its_oldest_chunks() -> None:
    """A chunk and what it looks back at have at most ``longest`` frames, but the chunk before is always seen."""
    noise = torch.randn(1, 11, 3, 2, 2)
    looked_back: list[tuple[Tensor, tuple[int, ...]]] = []

    def after(clean: Tensor, chunks: tuple[int, ...]):  # type: ignore[no-untyped-def]
        looked_back.append((clean, chunks))
        return lambda z, t, r: 0.5 * z

    video = torch.cat(list(follow_chunks(after, noise, [(1000.0, 0.0)], (1, 2, 2, 2, 4), longest=5)), dim=1)
    assert [chunks for _, chunks in looked_back] == [(), (1,), (1, 2), (2,), (2,)]
    for (clean, chunks), end in zip(looked_back, (0, 1, 3, 5, 7), strict=True):
        assert torch.equal(clean, video[:, end - sum(chunks) : end])


def test_one_chunk_is_the_plain_sampler_and_given_frames_fill_the_first() -> None:
    noise, known = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 2, 3, 2, 2)
    jumps = [(1000.0, 0.0)]
    [whole] = follow_chunks(lambda *_: lambda z, t, r: 0.5 * z, noise, jumps, (4,))
    assert torch.equal(whole, follow(lambda z, t, r: 0.5 * z, noise, jumps))
    parts = list(follow_chunks(lambda *_: lambda z, t, r: 0.5 * z, noise, jumps, (1, 1, 2), known))
    assert torch.equal(torch.cat(parts[:2], dim=1), known)
    torch.testing.assert_close(parts[2], 0.5 * noise[:, 2:])
    with pytest.raises(ValueError, match="end within a chunk"):
        list(follow_chunks(lambda *_: lambda z, t, r: z, noise, jumps, (1, 3), known))
    with pytest.raises(ValueError, match="the noise has 4"):
        list(follow_chunks(lambda *_: lambda z, t, r: z, noise, jumps, (1, 2)))
