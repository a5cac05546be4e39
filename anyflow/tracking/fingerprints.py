"""What a run stands on, in a few digits: its clips and the model that it starts from.

Two runs with the same recipe are the same only if these are the same too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anyflow.data.card import caption_identity
from anyflow.data.reader import find_split
from anyflow.data.shards import load_index
from anyflow.data.tars import load_set
from anyflow.evaluation.encoders import FRAMES, OWN
from anyflow.recipe import Recipe, is_hub_id
from anyflow.recipe.fields import value_of
from anyflow.system.files import file_sha256

DIGITS = 12
ENDS = 2**20
"""Bytes at each end of a file that are read: training changes every weight, so nothing hides between."""


def data_fingerprint(card: str, split: str, streaming: bool = False) -> str:
    """Of the bytes of a split's shards, as its index knows them; of tars that are streamed, of their names.

    Raises:
        UserError: there is no such card or split.
    """
    found = find_split(card, split, index=not streaming)
    tarset = load_set(found.folder)
    if streaming and tarset is not None:
        names = list(tarset.names())
    else:
        names = [f"{shard.name} {shard.bytes} {shard.content}" for shard in load_index(found.folder).shards]
    return _digest("\n".join([str(caption_identity(found.caption)), *names]).encode())


def model_fingerprint(model: str) -> str:
    """Of a model folder's weights and settings, or of an adapter's file; a hub id is its own.

    What is not there has none.
    """
    folder = Path(model).expanduser()
    if folder.is_file():  # an adapter of another tool
        return file_sha256(folder)[:DIGITS]
    if not folder.is_dir():
        return model if is_hub_id(model) else ""
    folder = folder / "model" if (folder / "model").is_dir() else folder
    kinds = (".json", ".safetensors")
    parts = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.is_file()):
        size = path.stat().st_size
        with open(path, "rb") as file:
            ends = file.read(ENDS)
            if size > ENDS:
                file.seek(max(ENDS, size - ENDS))
                ends += file.read()
        parts.append(f"{path.relative_to(folder)} {size} {_digest(ends)}")
    return _digest("\n".join(parts).encode())


def encoder_fingerprint(choice: str) -> str:
    """Of a network that judges clips (:mod:`anyflow.evaluation.encoders`): its name, or its weights."""
    path = Path(choice).expanduser()
    if choice in (*OWN, FRAMES):
        return choice
    if path.is_file():
        return f"{path.suffix} {file_sha256(path)[:DIGITS]}"
    return model_fingerprint(choice) if path.is_dir() else choice


def facts_of(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of what a recipe trains on: ``data``, ``start`` if it starts from weights, ``teacher`` if it
    names one.

    Raises:
        UserError: a card is missing.
    """
    data = [data_fingerprint(card, recipe.data.split, recipe.data.streaming) for card in recipe.data.card]
    starts = [recipe.model.weights] if recipe.model.init == "weights" else []
    starts += filter(None, [recipe.model.codec, recipe.model.lora.start])
    facts = {"data": " ".join(data), "start": " ".join(model_fingerprint(start) for start in starts)}
    teachers = filter(None, (value_of(recipe, key) for key in recipe.declared.folders))
    found = " ".join(model_fingerprint(teacher) for teacher in teachers)
    return {**facts, "teacher": found} if found else facts


def changed_facts(recorded: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """Which facts are others than were recorded; what was not recorded is taken as it is.

    Runs of before have no ``teacher``: theirs stands at the end of ``start`` (on-policy distillation), or nowhere.
    """
    known = dict(recorded)
    if "teacher" in now and "teacher" not in known and known.get("start") == f"{now['start']} {now['teacher']}".strip():
        known["start"] = now["start"]
    return [what for what, value in now.items() if known.get(what, value) != value]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
