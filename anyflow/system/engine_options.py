"""The engine that a command works with: ``--engine`` and ``--address``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from anyflow.errors import UserError
from anyflow.system.engines import Engine
from anyflow.system.option import option

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class EngineOptions:
    """Which engine the user asks for."""

    engine: str = option("local", "Who works: local (this machine) or ray (all machines of a Ray cluster).")
    address: str = option("auto", "Of the cluster's head, HOST:PORT; auto: the one that this machine belongs to.")

    @property
    def is_ray(self) -> bool:
        """Whether it is a cluster."""
        return self.engine == "ray"

    def check(self, devices: int | None = None) -> None:
        """Refuse an engine that is not known or not installed, before anything is done.

        Args:
            devices: of this machine that the user asks for, if any.

        Raises:
            UserError: it is not.
        """
        if self.engine not in ENGINES:
            raise UserError(f"--engine {self.engine!r} is not known: give {' or '.join(ENGINES)}")
        if self.address != "auto" and not self.is_ray:
            raise UserError(f"--address {self.address} is of a Ray cluster: give --engine ray with it, or leave it out")
        if self.is_ray and devices:
            raise UserError(
                f"--devices {devices} is of this machine; --engine ray takes the whole cluster: leave it out"
            )
        if self.is_ray and find_spec("ray") is None:
            raise UserError("--engine ray: Ray is not installed; run pip install -e '.[cluster]' on every machine")


def engine_of(options: EngineOptions, processes: int, gpus: bool = False) -> Engine:
    """The engine that is asked for.

    Args:
        options: the user's.
        processes: of this machine; 0: the work is done in this one.
        gpus: those processes have GPUs, one each.

    Raises:
        UserError: there is no such engine, or no such cluster.
    """
    options.check()
    if options.is_ray:
        from anyflow.system.ray_engine import RayEngine

        return RayEngine(options.address)
    from anyflow.system.pool import LocalEngine

    return LocalEngine(processes, gpus)
