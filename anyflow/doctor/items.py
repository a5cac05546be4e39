"""What is examined, in which order, what each item needs and about how long it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anyflow.errors import UserError

TINY = Path("data") / "models" / "tiny"
"""The embedded model, from where children run."""


@dataclass(frozen=True)
class Item:
    """One examination.

    Attributes:
        name: as it is asked for and told.
        work: ``module:function`` that a child calls with its findings, what is here, and a folder to work in.
        seconds: about how long it takes, on a CPU (two cores) and on a GPU (80 GB): it is left out where less is left.
        gpus: how many it needs at least.
    """

    name: str
    work: str
    seconds: tuple[float, float]
    gpus: int = 0

    def expected(self, is_gpu: bool) -> float:
        """Seconds on such a machine, the child's imports included."""
        return self.seconds[int(is_gpu)]

    def limit(self, is_gpu: bool) -> float:
        """Seconds after which it is taken to hang."""
        return 60.0 + 5.0 * self.expected(is_gpu)


MACHINE = Item("machine", "anyflow.doctor.machine:examine", (5, 10))
"""Comes first, whatever is asked for: what the others can be."""

ITEMS = (
    Item("attention", "anyflow.doctor.attention:examine", (10, 40)),
    Item("step", "anyflow.doctor.step:examine", (15, 100)),
    Item("vae", "anyflow.doctor.vae:examine", (10, 40)),
    Item("devices", "anyflow.doctor.devices:examine", (25, 40)),
    Item("compile", "anyflow.doctor.compiling:examine", (20, 50)),
    Item("resume", "anyflow.doctor.resume:examine", (45, 60)),
    Item("derivative", "anyflow.doctor.derivative:examine", (20, 30)),
    Item("ranks", "anyflow.doctor.ranks:examine", (5, 30), gpus=2),
)


def items_named(names: str) -> list[Item]:
    """Those of a list with commas, in the order that they run in; all of them for an empty one.

    Raises:
        UserError: one is not known.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [MACHINE.name, *(item.name for item in ITEMS)]
    for name in wanted:
        if name not in known:
            raise UserError(f"--only {name!r} is not known: give some of {', '.join(known)}")
    return [item for item in ITEMS if not wanted or item.name in wanted]
