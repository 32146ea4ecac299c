"""Fetches the word lists from their public homes and checks them.

    python -m experiments.morphology.download --data DIR

CoNLL-SIGMORPHON 2018 task 1 (github.com/sigmorphon/conll2018) and WikiPron (github.com/CUNY-CL/wikipron),
each at one commit; both are drawn from Wiktionary, CC BY-SA 3.0. About 17 MB. Files that are there and whole
are left alone; a download that broke off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

SUMS = Path(__file__).with_name("SHA256SUMS")
SIGMORPHON = "https://raw.githubusercontent.com/sigmorphon/conll2018/490e2e06"
WIKIPRON = "https://raw.githubusercontent.com/CUNY-CL/wikipron/185dfcf5"
SURPRISE = ("english", "french", "german", "dutch", "polish")  # languages of the task's second release


class Remote(NamedTuple):
    """One file: where it goes below the data folder, whence, and what it must hash to."""

    name: str
    url: str
    sha256: str


def sources(sums: Path = SUMS) -> list[Remote]:
    """Every file of the experiment.

    >>> len(sources())
    32
    """
    out = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, name = line.split()
        folder, file = name.split("/")
        if folder == "wikipron":
            url = f"{WIKIPRON}/data/scrape/tsv/{file}"
        else:
            part = "surprise" if file.split("-")[0] in SURPRISE else "all"
            url = f"{SIGMORPHON}/task1/{part}/{file}"
        out.append(Remote(name, url, digest))
    return out


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(remote: Remote, folder: Path, *, timeout: float = 60.0) -> bool:
    """Brings one file, going on from what an earlier try left in `NAME.part`.

    Returns:
        False if the file was already there and whole.

    Raises:
        ValueError: what came does not have the expected SHA-256 (the part is removed).
        OSError: the server could not be read; what did come stays for the next try.
    """
    path = folder / remote.name
    if path.exists() and digest_of(path) == remote.sha256:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            # A server that knows no ranges sends the whole file with status 200: begin again then.
            with part.open("ab" if answer.status == 206 else "wb") as file:
                while block := answer.read(1 << 16):
                    file.write(block)
            expected = answer.headers.get("Content-Length")
            came = part.stat().st_size - (have if answer.status == 206 else 0)
            if expected is not None and came < int(expected):
                raise OSError(
                    f"{remote.url}: the connection ended after {came} of {expected} bytes; run again"
                )
    except urllib.error.HTTPError as error:
        # 416: the part is already as long as the file, so only its sum remains to be checked.
        if error.code != 416:
            raise OSError(f"{remote.url}: the server answered {error.code} {error.reason}") from error
    found = digest_of(part)
    if found != remote.sha256:
        part.unlink()
        raise ValueError(f"{remote.url}: SHA-256 is {found}, expected {remote.sha256}; run again to refetch")
    part.replace(path)
    return True


def fetch_all(remotes: Sequence[Remote], folder: Path) -> int:
    """Brings all files, one after another; returns how many were fetched."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        return sum(fetch(remote, folder) for remote in bar.track(remotes, description="downloading"))


def main(argv: list[str] | None = None) -> None:
    """Downloads or, where all is there, only checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder to fill; a complete copy is only checked"
    )
    args = parser.parse_args(argv)
    remotes = sources()
    try:
        fetched = fetch_all(remotes, args.data)
    except (OSError, ValueError) as error:
        raise SystemExit(f"download: {error}") from error
    print(f"{len(remotes)} files in {args.data}, {fetched} of them fetched now; all sums agree")


if __name__ == "__main__":
    main()
