"""Objects in buckets, `s3://BUCKET/KEY` and `gs://BUCKET/KEY`: partial reads, conditional writes.

TensorStore makes the requests, as it does for the arrays of stores: one library, one set of credentials. For
S3 these are the credentials of AWS's tools (AWS_ACCESS_KEY_ID and the others, profiles, a machine's role);
AWS_ENDPOINT_URL names another service with the S3 protocol. For Google they are the application default
credentials; TENSORSTORE_GCS_HTTP_URL names another service.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from hydraopt_jax.errors import HydraOptError, one_line

SCHEMES = ("s3://", "gs://")
# of a request that the service or the network fails
RETRIES = {"max_retries": 4, "initial_delay": "300ms", "max_delay": "2s"}
# requests at once, and the largest object that one request writes
REQUESTS, LARGEST = 64, 5 << 30
# text of a TensorStore error -> its meaning, for errors that do not come from the object itself
MEANINGS = {
    "PERMISSION_DENIED": "no right to it: look at the credentials",
    "UNAUTHENTICATED": "no right to it: look at the credentials",
    "Credentials": "there are no credentials for it",
    "UNAVAILABLE": "no connection to the service",
    "retry attempts failed": "no connection to the service",
    "CURL error": "no connection to the service",
}


class StoredObject(NamedTuple):
    """An object, or some of its bytes.

    Attributes:
      data: the bytes; None if the object does not exist.
      version: identifies the state of the object; absence has a version too.
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
    """The address without trailing slashes.

    Raises:
      HydraOptError: the address has no bucket or no key.

    >>> address("s3://bucket/some/store/")
    's3://bucket/some/store'
    """
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.strip("/").partition("/")
    if not (bucket and key.strip("/")) or "//" in key:
        raise HydraOptError(f"{path}: give {scheme}://BUCKET/NAME")
    return f"{scheme}://{bucket}/{key}"


def spec(path: str) -> dict[str, Any]:
    """The TensorStore specification of an address; keys are appended without a separator."""
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
def key_value_store(text: str) -> Any:
    """The key-value store of a JSON specification."""
    import tensorstore

    return tensorstore.KvStore.open(json.loads(text)).result()


def keys_of(path: str) -> Any:
    """All keys that begin with an address."""
    return key_value_store(json.dumps(spec(path)))


@contextmanager
def explained(label: str, doing: str) -> Iterator[None]:
    """Turn errors of TensorStore into one-line errors."""
    try:
        yield
    except HydraOptError:
        raise
    except (ValueError, OSError, RuntimeError, PermissionError, NotImplementedError) as error:
        absent = "no such bucket" if "NOT_FOUND" in str(error) else ""
        said = meaning(error) or absent or one_line(error, 160)
        raise HydraOptError(f"{label}: cannot be {doing}: {said}") from None


def meaning(error: Exception) -> str:
    """The meaning of an error of a service or the network; "" for other errors."""
    said = str(error)
    return next((v for k, v in MEANINGS.items() if k in said), "")


def read_object(path: str, start: int = 0, stop: int | None = None) -> StoredObject:
    """An object, or its bytes from `start` to `stop`.

    Raises:
      HydraOptError: no connection, no right to it, or fewer bytes than asked for.
    """
    part = None if start == 0 and stop is None else slice(start, stop)
    with explained(path, "read"):
        found = keys_of(path).read("", byte_range=part).result()
    return StoredObject(found.value if found.state == "value" else None, found.stamp.generation)


def write(path: str, data: bytes, version: bytes | None = None) -> bool:
    """Write an object with one request; with `version` only if the object still has that version.

    Returns:
      Whether the object was written; False if it has another version.

    Raises:
      HydraOptError: no connection, no right to it, or more bytes than one request takes.
    """
    if len(data) > LARGEST:
        raise HydraOptError(
            f"{path}: {len(data):,} bytes are more than one request writes ({LARGEST:,}): choose a folder"
        )
    with explained(path, "written"):
        stamp = keys_of(path).write("", data, if_equal=version).result()
    # after a lost answer the request is repeated, and then finds the object that it has written
    return bool(stamp.generation) or read_object(path).data == data


def write_objects(path: str, files: Mapping[str, Any]) -> None:
    """Write many objects, a few at a time: key -> function that returns the bytes."""
    keys, waiting = keys_of(path), []
    with explained(path, "written"):
        for key, data in files.items():
            waiting.append(keys.write(key, data()))
            if len(waiting) == REQUESTS:
                waiting.pop(0).result()
        for x in waiting:
            x.result()


def keys(path: str) -> list[str]:
    """All keys that begin with an address, without the address."""
    with explained(path, "read"):
        return sorted(x.decode() for x in keys_of(path).list().result())


def remove_objects(path: str, names: Iterable[str]) -> None:
    """Remove the objects of some keys, given without the address."""
    found = keys_of(path)
    with explained(path, "written"):
        for x in [found.write(name, None) for name in names]:
            x.result()


def one_version(path: str) -> Any:
    """A function `(start, stop)` -> bytes of an object; all of the version that the first request finds."""
    seen: list[bytes] = []

    def part(start: int, stop: int) -> bytes:
        found = read_object(path, start, stop)
        seen.append(found.version)
        if found.data is None or found.version != seen[0]:
            raise HydraOptError(f"{path}: was changed while it was read: open it again")
        return found.data

    return part
