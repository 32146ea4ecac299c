"""Replace the content of a store's folder: segments, then the manifest, then what it does not name goes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydraopt_jax.errors import HydraOptError, TooLarge
from hydraopt_jax.store import checksums, folder, manifest, segment_data
from hydraopt_jax.store.folder import MANIFEST
from hydraopt_jax.store.store import Store

ROW = ("id", "bytes", "header", "sha256", "arrays", "files")


def whole(path: Path, row: Mapping[str, Any]) -> bool:
    """Whether the files of a segment are as they were written."""
    try:
        inside = path / folder.SEGMENTS / row["id"]
        return checksums.checksum(inside, [x for x, _ in row["arrays"]]) == row["files"]
    except OSError:
        return False


def is_current(path: Path, said: Mapping[str, Any] | None) -> bool:
    """Whether a folder has this manifest, or none if it is None; False if that cannot be found out."""
    try:
        return (folder.read_manifest(path) if (path / MANIFEST).exists() else None) == said
    except (OSError, HydraOptError):
        return False


def write_folder(
    path: Path,
    store: Store,
    limit: int | None = None,
    zstd: bool = True,
    known: Mapping[str, Any] | None = None,
    home: str | None = None,
    mark: str = "",
) -> None:
    """Write missing segments, then the manifest; then remove files that the manifest does not name.

    Nothing that the manifest of before names is written again, so that the former store stays whole until the
    rename.

    Args:
      limit, zstd: see `files.save`.
      known: segment id -> manifest row of existing segments that the manifest lacks: those of a job, or those
        in the bucket that the folder is written for.
      home: where those segments are, if not in the folder.
      mark: suffix of the names of new segments, where others may write the same ones at the same time.
    """
    fresh = not path.exists() or (known is None and folder.unfinished(path))
    before = folder.read_manifest(path) if (path / MANIFEST).exists() else None
    rows = {**(known or {}), **({x["id"]: x for x in before["segments"]} if before is not None else {})}
    written: dict[str, dict[str, Any]] = {}
    try:
        path.mkdir(parents=True, exist_ok=True)
        if before is None:
            (path / folder.NEW).touch()
        (path / folder.SEGMENTS).mkdir(exist_ok=True)
        for x in store.segments:
            name = segment_data.name_there(x, home or str(path))
            if name not in rows or name in written:
                name = segment_data.entry_of(x).id
                # equal bytes may be there under the name that is made of their checksum
                if name not in rows or name in written or (home is None and not whole(path, rows[name])):
                    name = segment_data.free_id(f"{name}-{mark}" if mark else name, rows.keys() | written)
            if name in rows:
                written[name] = {k: rows[name][k] for k in ROW}
            else:
                written[name] = folder.write_segment(path, x, name=name, zstd=zstd)
        said = manifest.as_json(store, list(written.values()), path.name)
        manifest.check_written(said, path.name)
        if limit is not None:
            size = len(manifest.gzipped(manifest.to_text(said))) + sum(
                folder.tree_bytes(path / folder.SEGMENTS / x) for x in written
            )
            if size > limit:
                raise TooLarge(f"{path}: the store would take {size:,} bytes, its input takes {limit:,}")
        folder.write_manifest(path, said)
    except BaseException:
        if not is_current(path, before):
            # the new manifest counts: what it names stays, and the next writer removes the rest
            raise
        if fresh and path.is_dir():
            folder.remove_unfinished(path)
        elif known is not None:
            # keep the segments of the job
            for name in written.keys() - rows.keys():
                folder.remove_segment(path, name)
        elif not fresh:
            folder.remove_unnamed(path, before)
        raise
    folder.remove_unnamed(path, said)
