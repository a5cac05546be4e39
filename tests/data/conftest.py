"""Shards of tiny clips."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tiny_shards import CLIPS, MakeShards, Parts, clip_parts

from anyflow.data import remote, tar_index
from anyflow.data.shards import write_samples

# A busy machine is no failure.
hypothesis.settings.register_profile("calm", deadline=None, max_examples=25)
hypothesis.settings.load_profile("calm")


@pytest.fixture(scope="session")
def good_parts() -> list[tuple[str, Parts]]:
    """(key, members) of all clips."""
    return [(f"clip-{number:03d}", clip_parts(number)) for number in range(CLIPS)]


@pytest.fixture
def make_shards(tmp_path: Path, good_parts: list[tuple[str, Parts]]) -> MakeShards:
    """Write shards of 7 clips, some of them replaced: ``make_shards({3: {"mp4": b"..."}})``."""

    def make(replaced: Mapping[int, Parts] | None = None, name: str = "train") -> Path:
        samples = [(key, (replaced or {}).get(number, parts)) for number, (key, parts) in enumerate(good_parts)]
        write_samples(samples, tmp_path / name, "tiny", per_shard=7)
        return tmp_path / name

    return make


@pytest.fixture
def shards(make_shards: MakeShards) -> Path:
    """A folder of good shards."""
    return make_shards()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and short waits between attempts."""
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BACK_OFF", 0.01)


@pytest.fixture
def again() -> Callable[[], None]:
    """Forget what this process looked at: as a new one would begin."""

    def forget() -> None:
        tar_index._ready.clear()
        if "s3fs" in sys.modules:
            sys.modules["s3fs"].S3FileSystem.clear_instance_cache()

    return forget


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a real S3 server on this machine, with a bucket ``footage``; credentials are in the environment."""
    pytest.importorskip("s3fs", reason="pip install '.[dev]'")
    server_module = pytest.importorskip("moto.server", reason="pip install '.[dev]'")
    import boto3
    import s3fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=address)
    client.create_bucket(Bucket="footage")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
