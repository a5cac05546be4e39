"""The stream of tars that come as they are: how far each worker of each rank is, and what could not be used."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyflow.data.batches import Batch
from anyflow.data.lanes import LaneState, TarDataset
from anyflow.data.skips import BUDGET_FLOOR, Skip, enforce_budget
from anyflow.data.stream import ClipStream, gathered
from anyflow.data.tar_index import WHOLE_TAR, left_out_of
from anyflow.data.tars import load_set
from anyflow.errors import UserError


class TarStream(ClipStream):
    """As :class:`ClipStream`, of a :class:`TarDataset`: its state holds for the same number of ranks and workers."""

    dataset: TarDataset

    def __init__(self, dataset: TarDataset, steps: int, error_budget: float = 0.01) -> None:
        super().__init__(dataset, steps, error_budget)
        self._begun: dict[int, LaneState] = {}
        self._told: set[str] = set()

    def advance(self, batch: Batch) -> None:
        """As :meth:`ClipStream.advance`: the worker that made the batch is behind it."""
        worker = batch["position"] % self.dataset.order.workers
        self.dataset.starts = {**self.dataset.starts, worker: LaneState.parse(batch["lane"])}
        super().advance(batch)
        if not self.dataset.passes_before(self.position):
            self._begun = self.dataset.starts

    def check(self, batch: Batch) -> Batch:
        """As :meth:`ClipStream.check`; tells extensions that nobody asks for, each once."""
        new = set(batch.get("unused", ())) - self._told
        if new and self.dataset.rank == 0:
            print(f"members that are not used: {', '.join(f'.{name}' for name in sorted(new))}", file=sys.stderr)
        self._told |= new
        return super().check(batch)

    def check_budget(self, position: int | None = None) -> None:
        """Compare the bad tars with all, and the bad clips with those read: how many there are is not known before.

        Raises:
            UserError: the budget is spent; names the first offenders.
        """
        skipped = list(self.skipped.values())
        enforce_tars(skipped, len(self.dataset.order.tars), self.error_budget)
        read = ((self.position if position is None else position) + 1) * self.dataset.batch
        starts = self.dataset.starts.values()
        whole = sum(state.whole for state in starts) * self.dataset.world_size
        is_known = len(starts) == self.dataset.order.workers and all(state.whole for state in starts)
        enforce_budget(skipped, read, whole if is_known else max(read, BUDGET_FLOOR), self.error_budget)

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`ClipStream.state_dict`, with every lane's place. All ranks must call this together."""
        own = {str(self.dataset.lane(worker)): state.text() for worker, state in self._begun.items()}
        lanes = {lane: text for part in gathered(own, self.dataset.world_size) for lane, text in part.items()}
        return {**super().state_dict(), "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            UserError: it is of other tars, ranks or workers, or of data that were not streamed.
        """
        if "lanes" not in state:
            raise UserError("The checkpoint's place in the data is one of an index: set data.streaming=false.")
        super().load_state_dict(state)
        workers = range(self.dataset.order.workers)
        lanes = {worker: state["lanes"].get(str(self.dataset.lane(worker))) for worker in workers}
        self._begun = {worker: LaneState.parse(text) for worker, text in lanes.items() if text}
        self.dataset.starts = self._begun


def left_out_within(folder: Path, error_budget: float) -> list[Skip]:
    """What an index of somebody else's tars left out; nothing for any other folder.

    Raises:
        UserError: more of the tars cannot be read than the budget allows.
    """
    tarset = load_set(folder)
    found = [Skip(*entry) for entry in left_out_of(folder)]
    if tarset is not None:
        enforce_tars(found, len(tarset.tars), error_budget)
    return found


def enforce_tars(skipped: Sequence[Skip], tars: int, error_budget: float) -> None:
    """Compare the tars that cannot be read, or not to their end, with all.

    Raises:
        UserError: there are more than the budget allows; names the first.
    """
    bad = [skip for skip in skipped if skip.key == WHOLE_TAR]
    if len(bad) > error_budget * tars:
        named = "; ".join(f"{skip.shard} ({skip.reason})" for skip in bad[:3])
        raise UserError(
            f"{len(bad)} of {tars} tars cannot be read, more than error_budget {error_budget:g} allows: {named}; "
            "repair or leave out these tars, or raise data.error_budget"
        )
