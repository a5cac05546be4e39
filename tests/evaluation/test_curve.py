"""The any-step curve: same prompts, same noise, a known outcome for a flow map in closed form."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import BlockCodec, exact_sampler, held_out, measure_curve, sampler_over
from torch import Tensor

from anyflow.backbone.conditions import Conditions
from anyflow.evaluation.curve import Curve, CurveResult, CurveRow, HeldOut, over_seeds
from anyflow.evaluation.heldout import as_asked
from anyflow.evaluation.measure import prompt_noise, sampler_of
from anyflow.evaluation.measurement import Judges
from anyflow.evaluation.report.tables import comparison_text
from anyflow.evaluation.told import Told
from anyflow.flowmap.sampling import Take, sample

# Few directions: the block codec's latents are as large as the pixels.

ITEMS, REFERENCE = held_out(6), held_out(6, offset=6)


@pytest.fixture(scope="module")
def faulty() -> CurveResult:
    """A model whose error grows with the jump."""
    return measure_curve(
        exact_sampler(ITEMS, error=0.6), BlockCodec(), ITEMS, REFERENCE, label="before", steps=(8, 1, 2), show=2
    )


def test_an_exact_flow_map_gives_the_real_clips_figures_at_any_number_of_steps() -> None:
    result = measure_curve(exact_sampler(ITEMS), BlockCodec(), ITEMS, REFERENCE, steps=(1, 4), show=2)
    curve = result.curve
    assert (
        curve.real == replace(curve.codec, path_error=curve.real.path_error, decoded_frechet=None)
        and curve.real.motion_accuracy == 1.0
        and curve.real.sliced_w1 > 0
    )
    for row in curve.rows:
        assert row.sliced_w1 == pytest.approx(curve.real.sliced_w1, rel=1e-3)
        assert row.frame_frechet == pytest.approx(curve.real.frame_frechet, rel=1e-2)
        assert row.motion_energy == pytest.approx(curve.real.motion_energy, rel=1e-2)
        assert row.motion_accuracy == 1.0 and row.motion_unread == 0.0
        assert row.nfe == row.num_steps and row.sampling_seconds > 0 and row.decoding_seconds > 0
    assert torch.equal(result.samples[4], torch.stack([item.frames for item in ITEMS[:2]]))


def test_an_error_that_grows_with_the_jump_gives_a_falling_curve(faulty: CurveResult) -> None:
    rows = faulty.curve.rows
    assert [row.num_steps for row in rows] == [1, 2, 8]
    for name in ("sliced_w1", "frame_frechet"):
        values = [getattr(row, name) for row in rows]
        assert values[0] > values[1] > values[2] > getattr(faulty.curve.real, name)
    assert faulty.curve.size == (17, 64, 96) and faulty.curve.clips == 6 and faulty.curve.domain == "driving"


def test_the_decoded_distance_leaves_out_what_the_codec_loses() -> None:
    class Blurred(BlockCodec):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents) // 64 * 64

    marks = measure_curve(exact_sampler(ITEMS), Blurred(), ITEMS, REFERENCE, steps=(1,)).curve
    lossless = measure_curve(exact_sampler(ITEMS), BlockCodec(), ITEMS, REFERENCE, steps=(1,)).curve
    assert lossless.codec.decoded_frechet == lossless.codec.frame_frechet
    for made in (marks.rows[0], marks.codec):
        assert made.decoded_frechet is not None and made.decoded_frechet < made.frame_frechet / 2
    assert marks.real.decoded_frechet is None, "real clips are no floor of a distance to decoded ones"


def test_the_samples_do_not_depend_on_the_batch_size(faulty: CurveResult) -> None:
    small = measure_curve(
        exact_sampler(ITEMS, error=0.6), BlockCodec(), ITEMS, REFERENCE, steps=(2,), batch_size=4, show=6
    )
    assert torch.equal(small.samples[2][:2], faulty.samples[2])


def test_the_noise_follows_seed_and_key_alone() -> None:
    shape = (5, 4, 2, 3)
    both = prompt_noise(shape, ["a", "b"], seed=1)
    assert both.shape == (2, *shape) and both.dtype == torch.float32
    assert torch.equal(prompt_noise(shape, ["b"], seed=1)[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(prompt_noise(shape, ["a"], seed=2)[0], both[0])


def test_several_seeds_give_their_mean_its_interval_and_each_value() -> None:
    """The real clips are encoded once; a row of three seeds is made of the rows of each."""

    class Codec(BlockCodec):
        encoded = 0

        def encode_video(self, video: Tensor) -> Tensor:
            self.encoded += len(video)
            return super().encode_video(video)

    codec, sampler = Codec(), exact_sampler(ITEMS, error=0.6)
    several = measure_curve(sampler, codec, ITEMS[:2], REFERENCE, steps=(1,), seeds=(0, 3, 5))
    assert codec.encoded == 2 * 2 and several.curve.seeds == (0, 3, 5) and several.curve.seed == 0
    row = several.curve.rows[0]
    alone = [
        measure_curve(sampler, codec, ITEMS[:2], REFERENCE, steps=(1,), seeds=(seed,)).curve.rows[0]
        for seed in (0, 3, 5)
    ]
    values = [each.sliced_w1 for each in alone]
    assert row.each["sliced_w1"] == values and row.sliced_w1 == pytest.approx(sum(values) / 3)
    spread = statistics.stdev(values)
    assert row.interval["sliced_w1"] == pytest.approx(4.3027 * spread / 3**0.5, rel=1e-4) and spread > 0
    assert alone[0].interval == {} and alone[0].each == {}
    kinds = {type(value) for value in json.loads(json.dumps(row.to_json())).values()}
    assert kinds <= {int, float, dict, type(None)}, "every number of a row is a figure"
    assert Curve.from_json(json.loads(json.dumps(several.curve.to_json()))) == several.curve


def test_a_figure_that_a_seed_lacks_has_no_interval() -> None:
    row = CurveRow(
        sliced_w1=1.0,
        frame_frechet=1.0,
        motion_accuracy=None,
        motion_unread=None,
        motion_energy=1.0,
        num_steps=2,
        nfe=2,
        sampling_seconds=0.0,
        decoding_seconds=0.0,
        more={"seen": 1.0},
    )
    pooled = over_seeds([row, replace(row, sliced_w1=3.0, more={})])
    assert pooled.sliced_w1 == 2.0 and pooled.motion_accuracy is None and pooled.figure("seen") == 1.0
    assert set(pooled.interval) == {
        "sliced_w1",
        "frame_frechet",
        "motion_energy",
        "sampling_seconds",
        "decoding_seconds",
    }


def test_a_model_is_sampled_its_own_way_and_re_noised_by_seed_and_key_alone() -> None:
    asked: list[tuple[str, Tensor]] = []

    def sampler(told: Told, noise: Tensor, steps: int, shift: float, **way: Take) -> Tensor:
        def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            asked.append((told.captions[0], z))
            assert not way or torch.equal(t, r)
            return z

        return sample(velocity, noise, steps, shift, first_frames=told.first_frames, **way)

    curves = {
        (kind, size): measure_curve(
            sampler,
            BlockCodec(),
            ITEMS[:2],
            REFERENCE,
            steps=(2,),
            sampler=kind,
            batch_size=size,
            show=2,  # type: ignore[arg-type]
        )
        for kind, size in (("euler", 2), ("renoise", 2), ("renoise", 1))
    }
    shown = {name: result.samples[2] for name, result in curves.items()}
    assert torch.equal(shown["renoise", 2], shown["renoise", 1])
    assert not torch.equal(shown["renoise", 2], shown["euler", 2])
    assert [result.curve.sampler for result in curves.values()] == ["euler", "renoise", "renoise"]


def test_every_step_count_starts_from_the_same_noise() -> None:
    seen: dict[int, list[Tensor]] = {}

    def velocity_for(captions: list[str]):  # type: ignore[no-untyped-def]
        def velocity(latents: Tensor, timestep: Tensor, r_timestep: Tensor) -> Tensor:
            if float(timestep[0]) == 1000:
                seen.setdefault(len(captions), []).append(latents.clone())
            return torch.zeros_like(latents)

        return velocity

    measure_curve(sampler_over(velocity_for), BlockCodec(), ITEMS[:2], REFERENCE, steps=(1, 2, 4), show=1)
    assert len(seen[2]) == 3 and all(torch.equal(seen[2][0], noise) for noise in seen[2])


def test_a_curve_survives_json(faulty: CurveResult) -> None:
    curve = faulty.curve
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve
    assert curve.row(2).num_steps == 2
    with pytest.raises(KeyError):
        curve.row(3)


def test_progress_reaches_its_total_and_too_few_reference_clips_are_refused() -> None:
    ticks: list[tuple[int, int, str]] = []
    measure_curve(
        exact_sampler(ITEMS),
        BlockCodec(),
        ITEMS[:3],
        REFERENCE,
        steps=(1, 2),
        batch_size=2,
        on_progress=lambda *tick: ticks.append(tick),
    )
    assert [done for done, _, _ in ticks] == [4, 8, 12, 16, 22, 28, 33, 38] and {total for _, total, _ in ticks} == {38}
    assert ticks[-1][2] == "1 step"  # the most steps come first: the others are compared with them
    with pytest.raises(ValueError, match="as many reference clips"):
        measure_curve(exact_sampler(ITEMS), BlockCodec(), ITEMS, REFERENCE[:3])


def test_attributes_that_a_caption_leaves_open_are_not_asked_for() -> None:
    clips = [
        HeldOut("a", "Turn left.", torch.zeros(1), "driving", {"manoeuvre": "left", "seed": 1, "path": [1, 2]}),
        HeldOut("b", "Turn left.", torch.zeros(1), "driving", {"manoeuvre": "left", "seed": 2, "path": [1, 2]}),
        HeldOut("c", "Drive.", torch.zeros(1), "driving", {"manoeuvre": "left"}),
        HeldOut("d", "Drive.", torch.zeros(1), "driving", {"manoeuvre": "right"}),
    ]
    kept = [item.attributes for item in as_asked(clips)]
    assert kept == [{"manoeuvre": "left", "path": [1, 2]}, {"manoeuvre": "left", "path": [1, 2]}, {}, {}]
    assert clips[0].attributes["seed"] == 1


def test_a_domain_without_a_probe_has_no_accuracy() -> None:
    items = [replace(item, domain="cooking") for item in ITEMS[:2]]
    curve = measure_curve(exact_sampler(items), BlockCodec(), items, REFERENCE, steps=(1,)).curve
    assert curve.rows[0].motion_accuracy is None and curve.real.motion_accuracy is None


def test_a_preview_is_compared_with_the_same_noise_at_the_most_steps() -> None:
    """An error that grows with the jump shows in the preview error alone at once; an exact flow map has none."""
    options: dict[str, Any] = {"steps": (1, 2, 8), "seeds": (0, 1)}
    exact = measure_curve(exact_sampler(ITEMS), BlockCodec(), ITEMS[:4], REFERENCE, **options).curve
    wrong = measure_curve(exact_sampler(ITEMS, error=0.3), BlockCodec(), ITEMS[:4], REFERENCE, **options).curve
    assert [row.num_steps for row in exact.rows] == [1, 2, 8]
    assert [row.preview_error for row in exact.rows] == pytest.approx([0, 0, 0], abs=1e-5)
    errors = [row.preview_error for row in wrong.rows]
    assert errors[0] > errors[1] > errors[2] == 0  # type: ignore[operator]
    assert len(wrong.rows[0].each["preview_error"]) == 2 and wrong.real.preview_error is None
    options = {"steps": (1, 2), "sampler": "renoise"}

    def renoised(*arguments: Any, take: Any) -> Tensor:
        return exact_sampler(ITEMS)(*arguments)

    assert measure_curve(renoised, BlockCodec(), ITEMS[:2], REFERENCE, **options).curve.rows[0].preview_error is None


def test_one_clip_to_compare_with_has_no_spread() -> None:
    """Figures in units of the reference's spread are left out, where they would divide by 0."""
    curve = measure_curve(exact_sampler(ITEMS[:1]), BlockCodec(), ITEMS[:1], REFERENCE[:1], steps=(1, 2)).curve
    assert (curve.rows[0].preview_error, curve.rows[0].spread, curve.real.spread) == (None, None, None)
    assert "NaN" not in json.dumps(asdict(curve))


def test_the_swap_gap_is_what_another_clips_controls_change() -> None:
    """Of a model that obeys as much as of real clips; of one that ignores its controls 0."""
    numbers = {item.caption: float(place) for place, item in enumerate(ITEMS)}
    items = [replace(item, controls=torch.full((len(item.frames), 1), numbers[item.caption])) for item in ITEMS]
    exact, by_number = exact_sampler(ITEMS), [item.caption for item in ITEMS]
    told: list[Told] = []

    def obeys(asked: Told, *arguments: Any) -> Tensor:
        told.append(asked)
        assert asked.controls is not None
        return exact(Told([by_number[int(number)] for number in asked.controls[:, 0, 0]]), *arguments)

    options: dict[str, Any] = {"steps": (1, 8), "seeds": (0, 1), "batch_size": 4}
    obedient = measure_curve(obeys, BlockCodec(), items, REFERENCE, **options).curve
    deaf = measure_curve(exact, BlockCodec(), items, REFERENCE, **options).curve
    assert [row.swap_gap for row in deaf.rows] == [0, 0] and deaf.real.swap_gap == obedient.real.swap_gap
    assert obedient.real.swap_gap is not None and obedient.real.swap_gap > 2
    assert [row.swap_gap for row in obedient.rows] == pytest.approx([obedient.real.swap_gap] * 2, rel=0.01)
    assert [row.path_error for row in obedient.rows] == pytest.approx([0, 0], abs=0.01)
    assert obedient.rows[0].nfe == 1 and len(told) == 2 * 2 * 2 * -(-len(ITEMS) // 4)
    plain = measure_curve(exact, BlockCodec(), ITEMS, REFERENCE, **options).curve
    assert plain.rows[0].swap_gap is None and plain.real.swap_gap is None


def test_given_frames_come_from_the_prompts_own_clips() -> None:
    seen: list[Tensor | None] = []
    exact = exact_sampler(ITEMS, error=0.6)

    def sampler(told: Told, noise: Tensor, steps: int, shift: float) -> Tensor:
        seen.append(told.first_frames)
        return exact(told, noise, steps, shift)

    given = measure_curve(sampler, BlockCodec(), ITEMS, REFERENCE, steps=(1,), batch_size=4, given_frames=1)
    latents = BlockCodec().encode_video(torch.stack([item.frames for item in ITEMS]))
    assert torch.equal(torch.cat(seen), latents[:, :1])  # type: ignore[arg-type]
    assert given.curve.given_frames == 1
    assert torch.equal(given.samples[1][:, 0], torch.stack([item.frames[0] for item in ITEMS]))
    free = measure_curve(sampler, BlockCodec(), ITEMS[:2], REFERENCE, steps=(1,))
    assert seen[-1] is None and not torch.equal(free.samples[1][:, 0], given.samples[1][:2, 0])


def test_models_with_and_without_given_frames_compare_where_both_leave_the_same_frames_out() -> None:
    """Distances of five latent frames and of four have other floors."""
    sampler, options = exact_sampler(ITEMS, error=0.6), {"steps": (1,), "batch_size": 4}
    given = measure_curve(sampler, BlockCodec(), ITEMS, REFERENCE, given_frames=1, **options).curve
    free = measure_curve(sampler, BlockCodec(), ITEMS, REFERENCE, **options).curve
    alike = measure_curve(sampler, BlockCodec(), ITEMS, REFERENCE, left_out=1, **options).curve
    assert (free.left_out, given.left_out, alike.left_out) == (0, 1, 1) and alike.given_frames == 0
    for name in ("sliced_w1", "frame_frechet", "frame_kernel", "motion_energy"):
        assert getattr(alike.real, name) == getattr(given.real, name) != getattr(free.real, name)
    assert Curve.from_json({name: value for name, value in given.to_json().items() if name != "left_out"}) == given


def test_further_figures_stand_beside_their_floor() -> None:
    """Exact samples: the path asked for, the given frames as they were, and what the extras say."""

    class Brightness:
        name = "light"

        def __call__(self, clips: Tensor) -> Tensor:
            return clips.double().mean((2, 3)).flatten(1)

    class Always:
        def accuracies(self, clips: Tensor, items: Sequence[HeldOut]) -> dict[str, float]:
            return {"colour_right": len(clips) / len(items)}

    extras = Judges([Brightness()], [Always()])
    curve = measure_curve(
        exact_sampler(ITEMS), BlockCodec(), ITEMS[:3], REFERENCE, steps=(1,), given_frames=1, judges=extras
    ).curve
    row, real = curve.rows[0], curve.real
    assert row.path_error == pytest.approx(0, abs=0.1) and real.path_error is not None and real.path_error > 0.2
    assert row.given_frame_psnr == 100
    assert row.temporal_consistency == pytest.approx(real.temporal_consistency, abs=1e-3)
    assert row.frame_kernel == pytest.approx(real.frame_kernel, abs=1e-2)
    assert set(row.more) == {"light_frechet", "light_kernel", "colour_right"} == set(real.more)
    text = comparison_text(None, curve)
    for heading in (
        "frame kernel",
        "temporal SSIM",
        "path error, px",
        "given frames, dB",
        "light kernel",
        "colour right",
    ):
        assert heading in text
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve


def test_the_models_own_sampler_gets_the_captions_embeddings() -> None:
    class Codec:
        def encode_text(self, captions: list[str]) -> str:
            return "+".join(captions)

    class Backbone:
        def sample(self, *arguments: object) -> object:
            return arguments

    noise = torch.ones(2)
    assert sampler_of(Backbone(), Codec())(Told(["a", "b"]), noise, 4, 5.0) == (
        Conditions("a+b", None),  # type: ignore[arg-type]
        noise,
        4,
        5.0,
    )


def test_a_damaged_curve_is_told_and_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from anyflow.evaluation.heldout import load_curve

    for content in (b"", b"PK\x03\x04 cut off"):
        (tmp_path / "before.pt").write_bytes(content)
        assert load_curve(tmp_path, "before") is None
        told = capsys.readouterr().err
        assert "before.pt is damaged" in told and told.count("\n") == 1
