"""Remote files: addresses, and byte ranges of a pinned version over HTTP.

`hf:ORG/NAME[/FILE.safetensors][@REVISION]` is a file on the Hugging Face hub, by default `store.safetensors`.
`https://...` is a file on any server. huggingface_hub is imported when an address is used, with the user's
session, cache, offline mode (HF_HUB_OFFLINE), endpoint (HF_ENDPOINT) and token (HF_TOKEN). A token is sent to
the hub only.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydraopt_jax.errors import HydraOptError, system_error
from hydraopt_jax.network import MEANINGS, STATUS, client, explained, meaning, quiet, redact

HUB, WEB = "hf:", ("https://", "http://")
# file name of the store in a repository
FILE = "store.safetensors"
COMMIT = re.compile(r"[0-9a-f]{40}")
# bytes of the first request, less than the header of any store with several tasks
FIRST = 1 << 12
# seconds to wait for the network, and between retries
TIMEOUT, PAUSES = 30.0, (0.3, 1.0)
AGAIN = (429, 500, 502, 503, 504)


class Address(NamedTuple):
    """The address of a file.

    Attributes:
      label: for messages, without credentials.
      repository, file, revision: on the hub; "" and None for a URL.
      url: of a file on another server; "" on the hub.
    """

    label: str
    repository: str = ""
    file: str = ""
    revision: str | None = None
    url: str = ""

    @property
    def text(self) -> str:
        """The address as it is given."""
        name = f"/{self.file}" if self.file != FILE else ""
        return self.url or f"{HUB}{self.repository}{name}{f'@{self.revision}' if self.revision else ''}"


class RemoteFile(NamedTuple):
    """One version of a file, with partial reads.

    Attributes:
      label: for messages.
      size: in bytes; None if the server does not say.
      version: identifies the version: commit on the hub, entity tag or generation elsewhere.
      read: `(start, stop)` -> bytes of the file.
      path: of its copy in the hub's cache; None if there is no copy.
    """

    label: str
    size: int | None
    version: str
    read: Callable[[int, int], bytes]
    path: Path | None = None


def is_address(path: Any) -> bool:
    """Whether a path is an address.

    >>> [is_address(x) for x in ("hf:org/name", "https://example.org/s.safetensors", "s.safetensors")]
    [True, True, False]
    """
    return isinstance(path, str) and path.startswith((HUB, *WEB))


def parse_address(text: str) -> Address:
    """The parts of an address.

    Raises:
      HydraOptError: the address names no file.

    >>> parse_address("hf:org/name@v1")[1:4], parse_address("hf:org/name/en.safetensors")[1:4]
    (('org/name', 'store.safetensors', 'v1'), ('org/name', 'en.safetensors', None))
    >>> parse_address("https://me:secret@example.org/s.safetensors?token=secret").label
    'https://example.org/s.safetensors'
    """
    if text.startswith(WEB):
        return Address(redact(text), url=text)
    where, _, revision = text.removeprefix(HUB).partition("@")
    organization, _, rest = where.partition("/")
    name, _, file = rest.partition("/")
    if not (organization and name) or (file and not file.endswith(".safetensors")):
        raise HydraOptError(
            f"{text}: give hf:ORG/NAME or hf:ORG/NAME/FILE.safetensors, and @REVISION if need be"
        )
    return Address(redact(text), f"{organization}/{name}", file or FILE, revision or None)


def find(text: str) -> RemoteFile:
    """The current version of the file at an address; a copy in the hub's cache is preferred.

    Raises:
      HydraOptError: no such file, no network, no right to it.
    """
    address = parse_address(text)
    return remote_file(address.label, address.url, {}, "", True) if address.url else on_hub(address)


def on_hub(address: Address) -> RemoteFile:
    """A file of a repository, at the current commit of a revision."""
    hub = client(address.label)
    from huggingface_hub.utils import build_hf_headers

    name, revision = (address.repository, address.file), address.revision
    commit = revision if revision and COMMIT.fullmatch(revision) else ""
    size = None
    if not (commit and cached(hub, name, commit)):
        with explained(address.label, "cannot be read"), quiet():
            try:
                found = hub.get_hf_file_metadata(hub.hf_hub_url(*name, revision=revision))
                commit, size = found.commit_hash or "", found.size
            except Exception as error:
                # no network: the commit of this branch that was downloaded last
                refused = getattr(getattr(error, "response", None), "status_code", 500) < 500
                copy = None if refused else cached(hub, name, revision)
                if copy is None:
                    raise
                commit = commit_of(copy, address.file)
    if not COMMIT.fullmatch(commit):
        raise HydraOptError(f"{address.label}: cannot be read: its server names no commit: is it a hub's?")
    copy = cached(hub, name, commit)
    if copy is not None and size in (None, copy.stat().st_size):
        # the place is needed in the message if the file is damaged
        label = f"{address.label} (cached at {copy})"
        return RemoteFile(label, copy.stat().st_size, commit, reader_of(f"{label}: {copy}", copy), copy)
    url = hub.hf_hub_url(*name, revision=commit)
    return remote_file(address.label, url, build_hf_headers(), commit, False)


def cached(hub: Any, name: tuple[str, str], revision: str | None) -> Path | None:
    """The file in the hub's cache; None if it is not there."""
    found = hub.try_to_load_from_cache(*name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def commit_of(copy: Path, file: str) -> str:
    """The commit of a file in the hub's cache, `.../snapshots/COMMIT/FILE`."""
    return copy.parts[-2 - file.count("/")]


def reader_of(label: str, path: Path) -> Callable[[int, int], bytes]:
    """A function `(start, stop)` -> bytes of a file on disk; `label` names it in errors."""

    def read(start: int, stop: int) -> bytes:
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError as error:
            raise system_error(label, "read", error) from None

    return read


def remote_file(label: str, url: str, headers: Mapping[str, str], version: str, tagged: bool) -> RemoteFile:
    """The file at a URL; with `tagged` all answers must be of the version of the first one."""
    first, size, tag = fetch(label, url, headers, 0, FIRST)
    pin = tag if tagged else ""
    sent = {**headers, "If-Match": pin} if pin.startswith('"') else dict(headers)

    def read(start: int, stop: int) -> bytes:
        if stop <= len(first):
            return first[start:stop]
        # bytes of the first request are not fetched again
        known = first[start:]
        data, now, other = fetch(label, url, sent, start + len(known), stop)
        if now != size or (tagged and other != pin):
            raise changed_file(label)
        return known + data

    return RemoteFile(label, size, version or tag, read)


def changed_file(label: str) -> HydraOptError:
    """The error for a file that is not the one that was opened."""
    return HydraOptError(f"{label}: was changed while it was read: open it again")


def fetch(label: str, url: str, headers: Mapping[str, str], start: int, stop: int) -> tuple[bytes, int, str]:
    """A byte range of a file (shorter at its end), the file's size, and its tag ("" if it has none).

    Raises:
      HydraOptError: no such file, no network, another version, or a server without byte ranges.
    """
    session = client(label).get_session()
    sent = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    for pause in (*PAUSES, None):
        try:
            with session.stream("GET", url, headers=sent, timeout=TIMEOUT) as response:
                if response.status_code not in AGAIN or pause is None:
                    return body(label, response, start, stop)
        except (HydraOptError, MemoryError):
            raise
        except Exception as error:
            said = meaning(error)
            if pause is None or said == MEANINGS["OfflineModeIsEnabled"]:
                raise HydraOptError(f"{label}: cannot be read: {said}") from None
        time.sleep(pause or 0.0)
    raise AssertionError("the last try returns or raises")


def body(label: str, response: Any, start: int, stop: int) -> tuple[bytes, int, str]:
    """The result of `fetch` from a response to a range request; never more bytes than requested."""
    status = response.status_code
    if status == 412:
        raise changed_file(label)
    if status == 200:
        raise HydraOptError(f"{label}: its server does not serve byte ranges: download the file")
    if status != 206:
        what = STATUS.get(status, f"the server says {status}")
        raise HydraOptError(f"{label}: cannot be read: {what}")
    said = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if said is None or int(said[1]) != start or int(said[2]) >= stop:
        raise HydraOptError(f"{label}: its server serves other bytes than asked for: download the file")
    expected, data = int(said[2]) + 1 - start, bytearray()
    for piece in response.iter_bytes():
        data += piece
        if len(data) > expected:
            break
    if len(data) != expected:
        # the connection broke: try again
        raise ConnectionError(f"{len(data)} of {expected} bytes came")
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return bytes(data), int(said[3]), tag
