"""Which attention kernel a GPU tries first: the recipe's, or the one that was the fastest here.

All are PyTorch's own ways to compute ``scaled_dot_product_attention``; Flash Attention 3 and 4, packages of their own,
take the place of its second there, with their backward passes. What a doctor finds to be the fastest is kept in a file
of this user's, for this kind of GPU and this PyTorch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from anyflow.errors import UserError, first_line
from anyflow.system.files import write_atomically

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

PACKAGES = {"flash3": ("FA3", "flash_attn_interface", (9,)), "flash4": ("FA4", "flash_attn.cute", (9, 10))}
"""PyTorch's name of a further Flash Attention, the module that has it, and the GPUs (major capability) that run it."""

_preferred = ExitStack()


def prefer_kernel(name: str) -> None:
    """Which attention kernel this process tries first on a GPU; the others serve calls that it cannot.

    It is set for the whole process and not round a pass, so that what is recomputed in a backward pass, or run under a
    choice of its own (forward-mode derivatives need ``math``), finds what it needs.

    Args:
        name: of :data:`KERNELS` or :data:`PACKAGES`; ``flex`` is for masks alone, and else as ``auto``. ``auto``: what
            was the fastest here (:func:`keep_fastest`); never measured: torch's own order, but cuDNN first on Hopper,
            where it is about twice as fast as torch's flash attention. Without a GPU nothing changes.

    Raises:
        UserError: this GPU cannot run the kernel, or its package is not here.
    """
    _preferred.close()
    if not torch.cuda.is_available():
        return
    if name in ("auto", "flex"):
        is_hopper = torch.cuda.get_device_capability()[0] == 9 and torch.backends.cudnn.is_available()
        name = kept_fastest()
        if name in PACKAGES and name not in usable_packages():  # it was measured in another environment
            name = ""
        name = name or ("cudnn" if is_hopper else "")
    if not name:
        return
    if name in PACKAGES:
        _activate(name, _preferred)
        name = "flash"
    order = [KERNELS[name], *(kernel for other, kernel in KERNELS.items() if other != name)]
    _preferred.enter_context(sdpa_kernel(order, set_priority=True))


def _activate(name: str, until: ExitStack) -> None:
    """Put a package in the place of PyTorch's flash attention, ``until`` the stack is closed."""
    impl, module, capabilities = PACKAGES[name]
    major, field = torch.cuda.get_device_capability()[0], f"hardware.attention={name}"
    if major not in capabilities:
        raise UserError(
            f"{field}: {torch.cuda.get_device_name()} cannot run it, which needs a GPU of capability "
            f"{' or '.join(f'{number}.0' for number in capabilities)}; set hardware.attention=auto"
        )
    current = current_flash_attention_impl()
    try:
        activate_flash_attention_impl(impl)
    except (ImportError, RuntimeError) as error:
        _restore(current)  # which the attempt has put away
        raise UserError(
            f"{field}: the package with {module} cannot be used ({first_line(error)}); install it, or set "
            "hardware.attention=auto"
        ) from error
    until.callback(_restore, current)


def _restore(impl: str | None) -> None:
    restore_flash_attention_impl(_raise_warn=False)
    if impl is not None:
        activate_flash_attention_impl(impl)


@contextmanager
def only_kernel(name: str) -> Iterator[None]:
    """Within the block there is one kernel alone, of :data:`KERNELS` or :data:`PACKAGES`."""
    with ExitStack() as stack:
        if name in PACKAGES:
            _activate(name, stack)
        elif (current := current_flash_attention_impl()) is not None:  # PyTorch's own flash is asked for
            restore_flash_attention_impl()
            stack.callback(_restore, current)
        stack.enter_context(sdpa_kernel(KERNELS.get(name, SDPBackend.FLASH_ATTENTION)))
        yield


def usable_packages() -> list[str]:
    """Those of :data:`PACKAGES` that run here."""
    found = []
    for name in PACKAGES if torch.cuda.is_available() else ():
        with suppress(UserError), only_kernel(name):
            found.append(name)
    return found


# What was the fastest here --------------------------------------------------------------------------------------------


def keep_fastest(name: str) -> Path:
    """Keep the kernel that ``auto`` takes on this kind of GPU from now on; returns the file."""
    file = _file()
    kept = {**_kept(), _here(): name}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return file


def kept_fastest() -> str:
    """What is kept for this kind of GPU; empty: nothing."""
    name = _kept().get(_here(), "")
    return name if name in KERNELS or name in PACKAGES else ""


def _kept() -> dict[str, str]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "anyflow" / "attention.json"


def _here() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
