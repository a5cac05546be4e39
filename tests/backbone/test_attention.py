"""Which attention kernel is tried first."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, current_flash_attention_impl, sdpa_kernel

from anyflow.backbone.kernels import KERNELS, PACKAGES, keep_fastest, only_kernel, prefer_kernel, usable_packages
from anyflow.backbone.options import Attention
from anyflow.errors import UserError
from anyflow.recipe import load_recipe


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "a GPU") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


def order() -> list[SDPBackend]:
    return list(_cur_sdpa_kernel_backends(with_priority=True))


@pytest.fixture(autouse=True)
def _leave_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = order()
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        prefer_kernel("auto")
    assert order() == before


def test_a_recipe_may_ask_for_every_kernel() -> None:
    assert set(get_args(Attention)) == {"auto", "flex", *KERNELS, *PACKAGES}


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
    pretend(monkeypatch, capability)
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


def test_what_was_the_fastest_here_is_taken_here_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches another GPU's measurement, one of another torch, and a file that somebody damaged."""
    pretend(monkeypatch, (9, 0), "one GPU")
    file = keep_fastest("efficient")
    prefer_kernel("auto")
    assert order()[0] == SDPBackend.EFFICIENT_ATTENTION
    prefer_kernel("flash")
    assert order()[0] == SDPBackend.FLASH_ATTENTION
    pretend(monkeypatch, (9, 0), "another GPU")
    prefer_kernel("auto")
    assert order()[0] == SDPBackend.CUDNN_ATTENTION
    pretend(monkeypatch, (9, 0), "one GPU")
    kept = file.read_text()
    for damaged in ("{", "[1]", kept.replace("efficient", "sorcery"), kept.replace(torch.__version__, "1.0")):
        file.write_text(damaged)
        prefer_kernel("auto")
        assert order()[0] == SDPBackend.CUDNN_ATTENTION


def test_a_package_that_is_not_here_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0))
    with pytest.raises(UserError, match=r"hardware\.attention=flash3: the package with flash_attn_interface .*=auto"):
        prefer_kernel("flash3")
    pretend(monkeypatch, (8, 0))
    with pytest.raises(UserError, match=r"hardware\.attention=flash4: a GPU cannot run it, .* 9\.0 or 10\.0"):
        prefer_kernel("flash4")
    assert usable_packages() == []


def test_a_package_takes_the_place_of_flash_until_another_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module brings ``torch.ops.flash_attn_3`` along, which PyTorch puts behind its own operators."""
    pretend(monkeypatch, (9, 0))
    module = ModuleType("flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    operators = ModuleType("flash_attn_3")
    operators.fwd = operators.bwd = lambda *_: None  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.ops, "flash_attn_3", operators, raising=False)
    monkeypatch.setattr(torch._C, "_set_sdp_use_fa3", lambda _: None, raising=False)
    assert usable_packages() == ["flash3"] and current_flash_attention_impl() is None
    prefer_kernel("flash3")
    assert order()[0] == SDPBackend.FLASH_ATTENTION and current_flash_attention_impl() == "FA3"
    keep_fastest("flash3")
    prefer_kernel("auto")
    assert current_flash_attention_impl() == "FA3" and usable_packages() == ["flash3"]
    assert current_flash_attention_impl() == "FA3", "an attempt at flash4 has put it back"
    with only_kernel("flash"):
        assert current_flash_attention_impl() is None, "PyTorch's own"
    assert current_flash_attention_impl() == "FA3"
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    prefer_kernel("auto")
    assert current_flash_attention_impl() is None, "kept by an environment that had the package"
    prefer_kernel("cudnn")
    assert order()[0] == SDPBackend.CUDNN_ATTENTION and current_flash_attention_impl() is None


def test_flex_is_for_networks_with_masks() -> None:
    with pytest.raises(UserError, match=r"hardware\.attention=flex .* model\.architecture is bidirectional"):
        load_recipe("forward/tiny", overrides=["hardware.attention=flex"])
    assert load_recipe("forward/tiny-causal", overrides=["hardware.attention=flex"]).hardware.attention == "flex"
