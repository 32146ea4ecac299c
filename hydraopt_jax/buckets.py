"""Objects in buckets, `s3://BUCKET/KEY` and `gs://BUCKET/KEY`: read in part, replaced on a condition.

By TensorStore, which reads the arrays of stores, too: one library, one set of credentials. Of S3 they are
what AWS's tools use (AWS_ACCESS_KEY_ID and the others, profiles, a machine's role), and AWS_ENDPOINT_URL
names another service that speaks S3. Of Google they are its application default credentials, and
TENSORSTORE_GCS_HTTP_URL names another service.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from hydraopt_jax.errors import HydraOptError

SCHEMES = ("s3://", "gs://")
# of a request that the service or the network fails
RETRIES = {"max_retries": 4, "initial_delay": "300ms", "max_delay": "2s"}
# requests at once, and the largest object that one request writes
REQUESTS, LARGEST = 64, 5 << 30
# what TensorStore says -> what it means, where nothing is wrong with the object itself
MEANINGS = {
    "PERMISSION_DENIED": "no right to it: look at the credentials",
    "UNAUTHENTICATED": "no right to it: look at the credentials",
    "Credentials": "there are no credentials for it",
    "UNAVAILABLE": "no connection to the service",
    "retry attempts failed": "no connection to the service",
    "CURL error": "no connection to the service",
}


class Found(NamedTuple):
    """An object, or some of its bytes.

    Attributes:
      data: the bytes; None where there is no such object.
      version: what tells one state of it from another, its absence too.
    """

    data: bytes | None
    version: bytes


def is_bucket(path: Any) -> bool:
    """Whether a path is in a bucket.

    >>> [is_bucket(x) for x in ("s3://b/store", "gs://b/s.safetensors", "store", "hf:org/name")]
    [True, True, False, False]
    """
    return isinstance(path, str) and path.startswith(SCHEMES)


def address(path: str) -> str:
    """An address without a slash at its end.

    Raises:
      HydraOptError: it names no bucket or nothing in it.

    >>> address("s3://bucket/some/store/")
    's3://bucket/some/store'
    """
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.strip("/").partition("/")
    if not (bucket and key.strip("/")) or "//" in key:
        raise HydraOptError(f"{path}: give {scheme}://BUCKET/NAME")
    return f"{scheme}://{bucket}/{key}"


def spec(path: str) -> dict[str, Any]:
    """What TensorStore opens an address by; keys follow it without a separator."""
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key, "gcs_request_retries": RETRIES}
    out: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key, "s3_request_retries": RETRIES}
    known = os.environ.get
    endpoint = known("AWS_ENDPOINT_URL_S3") or known("AWS_ENDPOINT_URL")
    if endpoint:
        region = known("AWS_REGION") or known("AWS_DEFAULT_REGION") or "us-east-1"
        out |= {"endpoint": endpoint, "aws_region": region}
    if known("AWS_ACCESS_KEY_ID") and known("AWS_SECRET_ACCESS_KEY"):
        out["aws_credentials"] = {"type": "environment"}
    return out


@functools.lru_cache(16)
def opened(text: str) -> Any:
    """A store of keys by its specification in JSON."""
    import tensorstore

    return tensorstore.KvStore.open(json.loads(text)).result()


def keys_of(path: str) -> Any:
    """The keys that begin with an address."""
    return opened(json.dumps(spec(path)))


@contextmanager
def explained(label: str, doing: str) -> Iterator[None]:
    """Turn what TensorStore says into one line."""
    try:
        yield
    except HydraOptError:
        raise
    except (ValueError, OSError, RuntimeError, PermissionError, NotImplementedError) as error:
        absent = "no such bucket" if "NOT_FOUND" in str(error) else ""
        said = meaning(error) or absent or " ".join(str(error).split())[:160]
        raise HydraOptError(f"{label}: cannot be {doing}: {said}") from None


def meaning(error: Exception) -> str:
    """What an error of a service or the network means; "" for any other."""
    said = str(error)
    return next((v for k, v in MEANINGS.items() if k in said), "")


def read(path: str, start: int = 0, stop: int | None = None) -> Found:
    """An object, or the bytes from `start` to `stop` of it.

    Raises:
      HydraOptError: no connection, no right to it, or fewer bytes than asked for.
    """
    part = None if start == 0 and stop is None else slice(start, stop)
    with explained(path, "read"):
        found = keys_of(path).read("", byte_range=part).result()
    return Found(found.value if found.state == "value" else None, found.stamp.generation)


def write(path: str, data: bytes, version: bytes | None = None) -> bool:
    """Write an object by one request; with `version` only over that state of it.

    Returns:
      Whether it was written: False where it is in another state.

    Raises:
      HydraOptError: no connection, no right to it, or more bytes than one request takes.
    """
    if len(data) > LARGEST:
        raise HydraOptError(
            f"{path}: {len(data):,} bytes are more than one request writes ({LARGEST:,}): choose a folder"
        )
    with explained(path, "written"):
        stamp = keys_of(path).write("", data, if_equal=version).result()
    # a request that is sent again because its answer was lost meets what it has written
    return bool(stamp.generation) or read(path).data == data


def upload(path: str, files: Mapping[str, Any]) -> None:
    """Write many objects, some at a time: key -> a function that returns its bytes."""
    keys, waiting = keys_of(path), []
    with explained(path, "written"):
        for key, data in files.items():
            waiting.append(keys.write(key, data()))
            if len(waiting) == REQUESTS:
                waiting.pop(0).result()
        for x in waiting:
            x.result()


def keys(path: str) -> list[str]:
    """What follows an address in the keys that begin with it."""
    with explained(path, "read"):
        return sorted(x.decode() for x in keys_of(path).list().result())


def remove(path: str, names: Iterable[str]) -> None:
    """Remove objects, by what follows an address."""
    found = keys_of(path)
    with explained(path, "written"):
        for x in [found.write(name, None) for name in names]:
            x.result()


def one_version(path: str) -> Any:
    """`(start, stop)` -> those bytes of an object, all of the version that the first request shows."""
    seen: list[bytes] = []

    def part(start: int, stop: int) -> bytes:
        found = read(path, start, stop)
        seen.append(found.version)
        if found.data is None or found.version != seen[0]:
            raise HydraOptError(f"{path}: was changed while it was read: open it again")
        return found.data

    return part
