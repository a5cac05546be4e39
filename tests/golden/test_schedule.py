"""Schedules, tables, path and step against the golden case."""

from __future__ import annotations

import pytest
import torch

from anyflow.flowmap.schedule import inference_timesteps, interpolate, shift_sigma, step, train_weight, weight_table

from .reference import load_case

CASE = load_case("scheduler")
KEYS = sorted(CASE)


def keys(prefix: str) -> list[str]:
    return [key for key in KEYS if key.startswith(prefix)]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("key", keys("apply_shift/"))
def test_shift(key: str) -> None:
    close(shift_sigma(CASE["u"], float(key.split("/")[-1])), CASE[key])


@pytest.mark.parametrize("key", keys("set_timesteps/"))
def test_inference_timesteps(key: str) -> None:
    _, num_steps, shift = key.split("/")
    close(inference_timesteps(int(num_steps), float(shift)), CASE[key])


@pytest.mark.parametrize("key", keys("table_weight/"))
def test_weight_table(key: str) -> None:
    _, kind, shift = key.split("/")
    timesteps, weights = weight_table(kind, float(shift))  # type: ignore[arg-type]
    close(timesteps, CASE[f"table_timesteps/{shift}"])
    close(weights, CASE[key])


@pytest.mark.parametrize("key", keys("query_weight_beta08/"))
def test_nearest_weight(key: str) -> None:
    close(train_weight(CASE["query_t"], "beta08", float(key.split("/")[-1])), CASE[key])


def test_path_and_step() -> None:
    clean, noise, t, r = (CASE[f"in/{name}"] for name in ("x0", "noise", "t", "r"))
    torch.testing.assert_close(interpolate(clean, noise, t), CASE["out/scale_noise"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step(clean, noise, t, r), CASE["out/step"], rtol=1e-5, atol=1e-6)
