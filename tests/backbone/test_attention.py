"""Which attention kernel is tried first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from anyflow.backbone.attention import prefer_kernel


def order() -> list[SDPBackend]:
    return list(_cur_sdpa_kernel_backends(with_priority=True))


@pytest.fixture(autouse=True)
def _leave_it_as_it_was() -> Iterator[None]:
    before = order()
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        prefer_kernel("auto")
    assert order() == before


@pytest.mark.parametrize(
    ("name", "capability", "first"),
    [
        ("auto", (8, 0), None),
        ("auto", (9, 0), SDPBackend.CUDNN_ATTENTION),
        ("flash", (9, 0), SDPBackend.FLASH_ATTENTION),
        ("math", (8, 0), SDPBackend.MATH),
    ],
)
def test_the_preferred_kernel_is_tried_first_and_the_others_stay(
    name: str, capability: tuple[int, int], first: SDPBackend | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kernel that is the only one (a mask that it cannot take would fail), and Hopper left to flash."""
    plain = order()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    prefer_kernel(name)
    if first is None:
        assert order() == plain
        return
    assert order()[0] == first
    assert {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH} <= set(order())
    with sdpa_kernel(SDPBackend.MATH):  # what forward-mode derivatives ask for
        assert order() == [SDPBackend.MATH]
    assert order()[0] == first


def test_nothing_changes_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another order of kernels, and so other roundings, on a CPU."""
    before = order()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prefer_kernel("math")
    assert order() == before
