"""A real S3 server (moto's) on loopback; clients find it as they find any other, through the environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "corpus"


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Starts it with an empty bucket; yields `s3://BUCKET`."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        client().create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        server.stop()


def client():
    """A plain client of the server."""
    return boto3.client("s3")


def upload(folder: Path, pattern: str = "*") -> None:
    """Put the files of a folder under their paths relative to it."""
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        client().put_object(Bucket=BUCKET, Key=str(path.relative_to(folder)), Body=path.read_bytes())
