"""Figures of rollouts, and the warnings that they give rise to."""

from __future__ import annotations

import pytest
import torch

from anyflow.stages.watch import RULES, DriftWatch, rollout_figures


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 5, 8, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_samples_like_the_data_are_healthy() -> None:
    figures = {name: float(value) for name, value in rollout_figures(latents(1), latents(2)).items()}
    assert figures["spread_ratio"] == pytest.approx(1, abs=0.05)
    assert figures["motion_ratio"] == pytest.approx(1, abs=0.05)
    assert figures["saturation"] == pytest.approx(0.002, abs=0.002)
    assert figures["sample_variance"] == pytest.approx(1, abs=0.05)


def test_each_illness_shows_in_its_figure() -> None:
    data = latents()
    assert float(rollout_figures(0.5 * data, data)["spread_ratio"]) == pytest.approx(0.5)
    assert float(rollout_figures(2.0 * data, data)["saturation"]) > 0.05
    still = data[:, :1].expand_as(data)
    assert float(rollout_figures(still, data)["motion_ratio"]) == 0
    assert "motion_ratio" not in rollout_figures(data[:, :1], data[:, :1])


@pytest.mark.parametrize(
    ("figure", "values", "word"),
    [
        ("spread_ratio", (1.0, 0.5), "collapse"),
        ("spread_ratio", (1.0, 1.6), "oversaturation"),
        ("saturation", (0.002, 0.2), "oversaturation"),
        ("motion_ratio", (1.0, 0.3), "stops moving"),
        ("motion_ratio", (1.0, 3.0), "flicker"),
        ("critic_loss", (0.1, 0.5), "loses track"),
        ("normaliser", (0.5, 0.1), "please the teacher"),
    ],
)
def test_a_drift_is_named_once_until_it_heals(figure: str, values: tuple[float, float], word: str) -> None:
    watch = DriftWatch(settle=5)
    healthy, ill = values

    def live(value: float, turns: int = 40) -> list[str]:
        return [sentence for _ in range(turns) for sentence in watch.see({figure: value})]

    assert live(healthy) == []
    [sentence] = live(ill)
    assert word in sentence and figure in sentence
    assert live(healthy) == []
    assert len(live(ill)) == 1


def test_noise_and_a_healthy_start_far_from_one_are_no_drift() -> None:
    watch = DriftWatch(settle=10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        value = 0.75 + 0.2 * float(torch.rand((), generator=generator))
        assert watch.see({"spread_ratio": value, "motion_ratio": value, "critic_loss": value}) == []


def test_a_resumed_watch_remembers_where_the_run_began() -> None:
    first, second = DriftWatch(settle=3), DriftWatch(settle=3)
    for _ in range(5):
        first.see({"motion_ratio": 1.0})
    second.state = first.state
    sentences = [sentence for _ in range(20) for sentence in second.see({"motion_ratio": 0.2})]
    assert len(sentences) == 1 and "from 1 " in sentences[0]


def test_every_rule_reads_a_figure_that_is_reported() -> None:
    reported = {*rollout_figures(latents(), latents()), "critic_loss", "normaliser"}
    assert {rule.figure for rule in RULES} <= reported
