"""``anyflow data encode``: footage and captions to a cache of latents and embeddings, in jobs for any engine's workers.

Every clip is encoded by itself, from its beginning, and every distinct caption once: what is written depends on nothing
else. A job is one shard; a note beside it says that it is whole. Broken off, encoding goes on after the whole shards,
with any number of workers.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.data.buckets import sort_clips
from anyflow.data.cache import TEXTS, LatentCache, LatentShape, cache_name, is_whole, source_digest, text_key
from anyflow.data.cached_choice import noted_choice
from anyflow.data.decode import Choice, ClipShape, DecodeError, decode_clip
from anyflow.data.encode_parts import CachePart, Encoder, EncodingCost, TimedTexts
from anyflow.data.order import digest
from anyflow.data.reader import TAR_BLOCK, ShardReader, check_length, find_split
from anyflow.data.shapes import tokens
from anyflow.data.shards import (
    INDEX_NAME,
    Sample,
    Shard,
    ShardIndex,
    dotless,
    shard_from_dict,
    shard_to_dict,
    write_tar,
)
from anyflow.data.skips import Skip, enforce_budget
from anyflow.data.tar_stream import left_out_within
from anyflow.errors import UserError
from anyflow.system.files import placing, write_atomically
from anyflow.system.locks import locked
from anyflow.system.pool import batches

CLIPS_PER_SHARD = 256
"""Clips, or captions, that one shard is made from: what is lost when encoding is broken off."""
PIXELS_PER_SHARD, LEAST_CLIPS = 2**30, 16
"""Large clips make smaller shards: 33 of 81 x 480 x 832, which keep a GPU busy for minutes rather than half an hour."""
TIMED_TEXTS = 4

log = logging.getLogger(__name__)


class Encoding:
    """The encoding of a card's split.

    Args:
        card: name or path of a card, or a folder of shards.
        split: "train" or "heldout".
        codec: the model's ends.
        shapes: of the clips, as training asks for them; a clip is brought to the one that fits it best.
        out: folder in which the cache's own folder is made; ``cache`` beside the card by default.
        prompts: further prompts to embed, such as the negative one.
        error_budget: largest share of unusable clips that is tolerated.

    Raises:
        UserError: the data are missing or too short.
    """

    def __init__(
        self,
        card: str | Path,
        split: str,
        codec: Encoder,
        shapes: Sequence[ClipShape],
        out: str | Path | None = None,
        *,
        prompts: Sequence[str] = (),
        error_budget: float = 0.01,
    ) -> None:
        footage = find_split(card, split, shapes=len(shapes) > 1)
        self.title = f"{card} {split}"
        self.codec, self.shapes, self.prompts, self.error_budget = codec, tuple(shapes), tuple(prompts), error_budget
        self.reader = ShardReader([footage.folder], [footage.caption])
        if len(self.shapes) == 1:
            check_length(footage, self.shapes[0])
        self._footage = footage
        self.fingerprint, self.source = codec.fingerprint, source_digest(self.reader, footage.caption)
        parent = Path(out) if out is not None else footage.home / "cache"
        self.folder = parent / cache_name(footage, split, self.shapes, self.source, self.fingerprint)
        self.partial = parent / f".{self.folder.name}.part"
        self.report = self.partial / "skipped.json"
        self.lock = parent / f".{self.folder.name}.lock"
        self.left_out = left_out_within(footage.folder, error_budget)
        self.skipped: list[Skip] = []
        self.done = 0

    @cached_property
    def places(self) -> list[tuple[int, Sample, int]]:
        """(shard, sample, number of its shape) of every clip, in the index's order; too short ones are left out."""
        if len(self.shapes) == 1:
            return [(n, sample, 0) for n, (_, shard) in enumerate(self.reader.shards) for sample in shard.samples]
        found = [
            (number, place, chosen)
            for chosen, kept in enumerate(sort_clips(self.reader, [self._footage], self.shapes))
            for number, numbers in enumerate(kept)
            for place in numbers
        ]
        return [(number, self.reader.sample(number, place), chosen) for number, place, chosen in sorted(found)]

    @cached_property
    def texts(self) -> list[str]:
        """Every distinct caption, in the order of the clips, after the prompts; captions of bad clips are left out."""
        texts = dict.fromkeys(self.prompts)
        for shard, sample, _ in self.places:
            try:
                texts.setdefault(self.reader.describe(shard, sample)["caption"])
            except DecodeError:
                continue  # told when its turn to be encoded comes
        return list(texts)

    @property
    def timed_texts(self) -> TimedTexts:
        """What an estimate needs of the captions."""
        return TimedTexts(tuple(self.texts[-TIMED_TEXTS:]), len(self.texts))

    @cached_property
    def jobs(self) -> list[CachePart]:
        """All shards to write."""
        largest = max(shape.frames * shape.height * shape.width for shape in self.shapes)
        clips = min(CLIPS_PER_SHARD, max(LEAST_CLIPS, PIXELS_PER_SHARD // largest))
        return [
            *(
                CachePart("texts", number, items, tuple(self.texts[items.start : items.stop]))
                for number, items in enumerate(batches(len(self.texts), CLIPS_PER_SHARD))
            ),
            *(CachePart("latents", *numbered) for numbered in enumerate(batches(len(self.places), clips))),
        ]

    def open_jobs(self) -> list[CachePart]:
        """The shards that are not written yet."""
        return [job for job in self.jobs if self._done(job) is None]

    def is_whole(self) -> bool:
        """Whether it is done already; a damaged result is removed."""
        return is_whole(self.folder, self.fingerprint)

    def begin(self) -> None:
        """Make the working folder.

        Raises:
            UserError: it cannot be made.
        """
        with _told(self.folder):
            (self.partial / TEXTS).mkdir(parents=True, exist_ok=True)

    def run(self, job: CachePart, progress: Callable[[int, int], None] | None = None) -> list[Skip]:
        """Write one shard, unless it is there; ``progress`` is called with (clips done by this process, of all).

        Returns:
            The clips that could not be encoded.

        Raises:
            UserError: too many clips are bad, or the folder cannot be written.
        """
        tar = self._home(job) / f"{job.name}.tar"
        if (known := self._done(job)) is not None:
            self.done += len(job.items) if job.kind == "latents" else 0
            return [Skip(**skip) for skip in known["skipped"]]
        before = len(self.skipped)
        latent_shapes: dict[int, LatentShape] = {}
        with _told(self.folder):
            with placing(tar) as place:  # a worker that was believed lost may still be at it
                if job.kind == "texts":
                    shard = write_tar(self._embedded(job.texts), place)
                else:
                    shard = write_tar(self._encoded(job.items, latent_shapes, progress), place)
            note = {
                "items": [job.items.start, job.items.stop],
                "shard": shard_to_dict(shard),
                "skipped": [asdict(skip) for skip in self.skipped[before:]],
                "latent_shapes": list(latent_shapes.items()),
            }
            with placing(tar.with_suffix(".done")) as place:
                place.write_text(json.dumps(note))
        return self.skipped[before:]

    def finish(self) -> None:
        """Put the shards together as the cache; it appears whole or not at all.

        Raises:
            UserError: too many clips are bad, none could be encoded, or the folder cannot be written.
        """
        skipped = list(self.left_out)
        shards: dict[str, list[Shard]] = {"texts": [], "latents": []}
        latent_shapes: dict[int, LatentShape] = {}
        with _told(self.folder):
            for job in self.jobs:
                note = self._done(job)
                assert note is not None, f"{job.name} is not done"
                skipped += [Skip(**skip) for skip in note["skipped"]]
                latent_shapes |= {number: tuple(shape) for number, shape in note["latent_shapes"]}
                shard = shard_from_dict(note["shard"])
                if shard.samples:
                    shards[job.kind].append(replace(shard, made_from=self._made_from(shard)))
                else:
                    (self._home(job) / shard.name).unlink(missing_ok=True)
            total = len(self.places) + len(self.left_out)
            enforce_budget(skipped, total, total, self.error_budget, self.report)
            self.report.unlink(missing_ok=True)
            if not shards["latents"]:
                raise UserError(f"card {self.title}: no clip can be encoded")
            for kind, folder in (("texts", self.partial / TEXTS), ("latents", self.partial)):
                index = ShardIndex(tuple(shards[kind])).to_dict()
                write_atomically(folder / INDEX_NAME, json.dumps(index, separators=(",", ":")).encode())
            shapes = tuple(latent_shapes.get(number) for number in range(len(self.shapes)))
            cache = LatentCache(self.fingerprint, self.source, self.shapes, shapes, len(self.texts), tuple(skipped))
            cache.save(self.partial)
            for note_path in self.partial.rglob("*.done"):
                note_path.unlink()
            for leftover in self.partial.rglob(".*"):  # of killed workers
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            self.partial.rename(self.folder)
        for skip in skipped:
            log.warning("not encoded: %s", skip)

    def _made_from(self, shard: Shard) -> str:
        """What a shard was computed from: a run goes on where its cache had to be made again."""
        return digest("\n".join([self.source, self.fingerprint, *(f"{s.key} {s.shape}" for s in shard.samples)]))

    @contextmanager
    def held(self, waits: bool = True) -> Iterator[bool]:
        """Keep other processes from encoding the same, or wait for the one that does; is anything left to do?

        Raises:
            UserError: another one does and ``waits`` is False, or the folder cannot be written.
        """
        with ExitStack() as stack:
            with _told(self.folder):
                self.lock.parent.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(locked(self.lock, patience=0, passing=True))
                except BlockingIOError as error:
                    if not waits:
                        raise UserError(
                            f"card {self.title} is being encoded by another process: wait for it, or stop that one"
                        ) from error
                    log.warning("card %s is being encoded by another process: waiting for it", self.title)
                    stack.enter_context(locked(self.lock, passing=True))
            yield not self.is_whole()

    def all(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Everything in this process, unless it is there; who calls holds it (:meth:`held`) where others may too."""
        if self.is_whole():
            return
        self.begin()
        for job in self.jobs:
            self.run(job, progress)
        self.finish()

    def _encoded(
        self, numbers: range, latent_shapes: dict[int, LatentShape], progress: Callable[[int, int], None] | None
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, members) of every usable clip; ``latent_shapes`` is added to."""
        for number in numbers:
            shard, sample, chosen = self.places[number]
            self.done += 1
            choice = Choice()
            try:
                description = self.reader.describe(shard, sample)
                frames = decode_clip(self.reader.video(shard, sample), self.shapes[chosen], choice=choice)
                description |= noted_choice(description, choice, self.shapes[chosen])
            except DecodeError as error:
                self.skipped.append(Skip(self.reader.shards[shard][1].name, sample.key, str(error)))
                enforce_budget(self.skipped, self.done, len(self.places), self.error_budget, self.report)
                continue
            latents = self.codec.encode_video(torch.from_numpy(frames)[None])[0].half().cpu()
            latent_shapes[chosen] = tuple(latents.shape)  # type: ignore[assignment]
            text = json.dumps(description, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            yield dotless(sample.key), {"safetensors": _save("latents", latents), "json": text.encode()}
            if progress is not None:
                progress(self.done, len(self.places))

    def _embedded(self, texts: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, members) of some captions."""
        for text in texts:
            embedding = _save("text", self.codec.embed(text))
            yield text_key(text), {"safetensors": embedding, "json": json.dumps({"caption": text}).encode()}

    def _home(self, job: CachePart) -> Path:
        return self.partial / TEXTS if job.kind == "texts" else self.partial

    def _done(self, job: CachePart) -> dict[str, Any] | None:
        """What the note of a job says, if its shard is whole."""
        try:
            note = json.loads((self._home(job) / f"{job.name}.done").read_text())
            shard = shard_from_dict(note["shard"])
            whole = not shard.samples or (self._home(job) / shard.name).stat().st_size == shard.bytes
            same = note["items"] == [job.items.start, job.items.stop]
            return note if same and whole and {"skipped", "latent_shapes"} <= note.keys() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def estimate(encoding: Encoding, timed: TimedTexts | None = None) -> EncodingCost:
    """What it takes: encode the first usable clip twice, once to warm up, and a few captions, and multiply.

    Args:
        encoding: of what.
        timed: the captions, where this process need not read all of them.

    Raises:
        UserError: none of the first clips can be used.
    """
    text_seconds, text_bytes = 0.0, 0
    timed, places, shapes = timed or encoding.timed_texts, encoding.places, encoding.shapes
    for text in timed.texts:
        started = time.perf_counter()
        text_bytes += len(_save("text", encoding.codec.embed(text))) + 4 * TAR_BLOCK
        text_seconds += time.perf_counter() - started
    for number, (_, _, chosen) in enumerate(places[:20]):
        for _, parts in encoding._encoded(range(number, number + 1), {}, None):
            started = time.perf_counter()
            list(encoding._encoded(range(number, number + 1), {}, None))
            seconds = time.perf_counter() - started
            size = sum(map(len, parts.values())) + 3 * TAR_BLOCK
            # A clip of another shape costs by its tokens.
            clips = sum(tokens(shapes[other]) for _, _, other in places) / tokens(shapes[chosen])
            texts = timed.of / max(len(timed.texts), 1)
            encoding.skipped, encoding.done = [], 0
            return EncodingCost(
                len(places),
                timed.of,
                round(clips * size + texts * text_bytes),
                clips * seconds + texts * text_seconds,
            )
    raise UserError(f"card {encoding.title}: none of the first clips can be encoded")


def _save(name: str, tensor: Tensor) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous()})


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What the system says of files that cannot be written, in a sentence."""
    try:
        yield
    except OSError as error:
        what = f"the cache {str(folder)!r} cannot be written: {error.strerror or error}"
        card = "copy the card, with full paths in its splits, to another disk"
        remedy = f"make room or its disk writable, {card}, or train from the footage by data.precompute=false"
        raise UserError(f"{what}; {remedy}") from error
