"""Kept samples: found again by all that decides them and by nothing less, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import BlockCodec, exact_sampler, held_out, measure_curve
from torch import Tensor

from anyflow.backbone.guidance import UNGUIDED, Guidance
from anyflow.evaluation.curve import CurveResult
from anyflow.evaluation.kept_samples import KeptSamples

ITEMS, REFERENCE = held_out(4), held_out(4, offset=4)


def test_what_is_kept_comes_back_to_the_bit(tmp_path: Path) -> None:
    kept, latents = KeptSamples(tmp_path / "new", "tiny"), torch.randn(2, 3, 4).bfloat16()
    name = kept.name((torch.zeros(2),), ("a car", 4))
    assert kept.load(name) is None
    kept.save(name, latents, 0.1)
    found = KeptSamples(tmp_path / "new", "tiny").load(name)
    assert found is not None and torch.equal(found[0], latents) and found[1] == 0.1


def test_other_samples_have_another_name(tmp_path: Path) -> None:
    kept, noise = KeptSamples(tmp_path, "tiny"), torch.zeros(2, 3)
    names = [
        kept.name((noise, None), ("a car", 4)),
        kept.of("another").name((noise, None), ("a car", 4)),
        kept.name((noise, None), ("a car", 8)),
        kept.name((noise, noise), ("a car", 4)),
        kept.name((noise + 1e-7, None), ("a car", 4)),
        kept.name((noise.T, None), ("a car", 4)),
        kept.name((noise.double(), None), ("a car", 4)),
    ]
    assert len(set(names)) == len(names)
    assert kept.name((noise.clone(), None), ("a car", 4)) == names[0]


def test_a_curve_that_is_measured_again_samples_nothing_and_tells_the_same(tmp_path: Path) -> None:
    calls = []

    def measure(kept: KeptSamples | None, steps: tuple[int, ...]) -> CurveResult:
        def sampler(*arguments: Any) -> Tensor:
            calls.append(arguments[2])
            return exact(*arguments)

        exact = exact_sampler(ITEMS, 0.8)
        options = {"steps": steps, "seeds": (0, 1), "batch_size": 2, "kept": kept}
        return measure_curve(sampler, BlockCodec(), ITEMS, REFERENCE, **options)

    first = measure(KeptSamples(tmp_path), (1, 4))
    assert len(calls) == 2 * 2 * 2
    again = measure(KeptSamples(tmp_path), (1, 2, 4))
    assert calls[8:] == [2] * 4, "of what is kept nothing, of what is new everything"
    for one, other in zip(first.curve.rows, (again.curve.row(1), again.curve.row(4)), strict=True):
        assert one.sampling_seconds == other.sampling_seconds and one.sliced_w1 == other.sliced_w1
    assert torch.equal(first.samples[4], again.samples[4])


def test_guided_samples_are_others_and_cost_two_calls_a_step(tmp_path: Path) -> None:
    """Catches kept samples of another scale or negative prompt, and costs that count steps instead of calls."""
    names, seen = [], []

    class Store(KeptSamples):
        def name(self, tensors: Any, facts: Any) -> str:
            names.append(facts)
            return super().name(tensors, facts)

    def measure(guidance: Guidance) -> CurveResult:
        options = {"steps": (1, 4), "guidance": guidance, "on_progress": lambda *now: seen.append(now)}
        return measure_curve(
            exact_sampler(ITEMS), BlockCodec(), ITEMS, REFERENCE, kept=Store(tmp_path), batch_size=4, **options
        )

    plain = measure(UNGUIDED)
    assert [len(facts) for facts in names] == [6, 6], "as they were named before there was guidance"
    total = seen[-1][1]
    guided = measure(Guidance(2.0, "still"))
    measure(Guidance(3.0, "still")), measure(Guidance(3.0, "blurred"))
    assert len({repr(facts) for facts in names}) == 8 == len(list(tmp_path.glob("*.safetensors")))
    assert [row.nfe for row in plain.curve.rows] == [1, 4] and [row.nfe for row in guided.curve.rows] == [2, 8]
    assert seen[-1][:2] == (total + 5, total + 5), "1 and 4 calls more, and all of them are counted"
    assert (plain.curve.guidance_scale, guided.curve.guidance_scale) == (1.0, 2.0) and not plain.curve.notes
    assert guided.curve.notes == ("guidance 2 against the negative prompt 'still': two network calls a step",)


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_broken_file_is_sampled_again(tmp_path: Path, content: bytes) -> None:
    kept = KeptSamples(tmp_path)
    (tmp_path / "name.safetensors").write_bytes(content)
    assert kept.load("name") is None


def test_only_what_was_used_is_forgotten(tmp_path: Path) -> None:
    kept = KeptSamples(tmp_path / "kept")
    other, further = KeptSamples(tmp_path / "kept"), kept.of("further")
    for store, name in ((kept, "a"), (further, "b"), (other, "c")):
        store.save(name, torch.zeros(1), 1.0)
    kept.clear()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["c.safetensors"]
    other.clear()
    assert not (tmp_path / "kept").exists()
