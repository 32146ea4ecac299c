"""Stores on the Hugging Face hub: push one file with a model card, pull all tasks or some.

`hydraopt_jax.open("hf:ORG/NAME")` reads a store there without pulling it, see `remote`.
"""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydraopt_jax import network, remote
from hydraopt_jax.errors import HydraOptError, system_error
from hydraopt_jax.formats.peft_config import same_base
from hydraopt_jax.integrations import model_card
from hydraopt_jax.store import Store, files, portable, removal, sizes
from hydraopt_jax.store.decoding import named_tasks

CARD = "README.md"


class Pushed(NamedTuple):
    """Result of a push.

    Attributes:
      repository: ORG/NAME.
      revision: the commit.
      url: of the repository.
      bytes: of the store's file.
      base_models: names of the adapters' base models.
      licenses: task -> license of its source, if known.
    """

    repository: str
    revision: str
    url: str
    bytes: int
    base_models: tuple[str, ...]
    licenses: dict[str, str]


class Pulled(NamedTuple):
    """Result of a pull.

    Attributes:
      source: the address.
      revision: the commit.
      store: path that was written.
      tasks: names.
      bytes: of the written store.
    """

    source: str
    revision: str
    store: str
    tasks: tuple[str, ...]
    bytes: int


def address_of(name: str) -> remote.Address:
    """The address of a repository given as ORG/NAME or hf:ORG/NAME[/FILE.safetensors][@REVISION]."""
    if name.startswith(remote.WEB):
        raise HydraOptError(f"{network.redact(name)}: give ORG/NAME, a repository of the hub")
    return remote.parse_address(remote.HUB + name.removeprefix(remote.HUB))


def check_store_base(label: str, store: Store, model: str | None) -> None:
    """Raise if an adapter of a store has another base model or none; None accepts any."""
    found = model_card.bases_of(store) or ("no base model",)
    wrong = [] if model is None else [x for x in found if not same_base(x, model)]
    if wrong:
        raise HydraOptError(f"{label}: its adapters are of {wrong[0]!r}, not of {model!r}")


def without_paths(store: Store) -> Store:
    """The store without local paths; only the names of files and folders stay."""
    own = lambda x: x if x.startswith(remote.HUB) else Path(x).name  # noqa: E731
    known = {}
    for key, said in store.report.get("provenance", {}).items():
        paths = {k: own(v) for k, v in said["options"].items() if k == "calibration"}
        known[key] = {**said, "options": {**said["options"], **paths}}
    report = store.report.replace(provenance=known) if known else store.report
    if left := report.get("left_out"):
        report = report.replace(left_out={own(k): v.replace(k, own(k)) for k, v in left.items()})
    sources = tuple(x._replace(origin=own(x.origin)) for x in store.sources)
    return store.replace(sources=sources, report=report)


def push(
    path: files.Path_,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "",
    license: str | None = None,
    progress: bool = False,
) -> Pushed:
    """Write a store to a repository of the hub, as one file with a model card, in one commit.

    In an existing card only the part between this package's marks is replaced.

    Args:
      path: of the store, see `store.open`.
      name: ORG/NAME; the repository is created if missing.
      private: whether a new repository is private; None for the organization's default.
      revision: branch, created if missing; None for main.
      message: of the commit.
      license: of the store; None for the common license of all sources, if they have one.
      progress: show the progress of the upload.

    Raises:
      HydraOptError: no store, no network, no token, or no right to write there.
    """
    address = address_of(name)
    if address.revision is not None:
        raise HydraOptError(f"{name}: a branch to push to is given as --revision {address.revision}")
    hub = network.client(address.label)
    content = files.open(path)
    if not content.tasks:
        raise HydraOptError(f"{path}: has no tasks: there is nothing to push")
    repository, what = address.repository, "cannot be pushed"
    with tempfile.TemporaryDirectory(prefix="hydraopt-push-") as work, network.quiet(progress):
        file = Path(work) / remote.FILE
        try:
            portable.write_portable(file, without_paths(content))
        except OSError as error:
            raise system_error(work, "written", error, "; TMPDIR names another folder") from None
        licenses = model_card.licenses_of(content)
        with network.explained(address.label, what):
            api = hub.HfApi()
            url = str(api.create_repo(repository, private=private, exist_ok=True))
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            # a commit by somebody else in between makes this one fail
            head = api.model_info(repository, revision=revision).sha
            before = old_card(hub, repository, head)
            size = file.stat().st_size
            card = model_card.render(content, repository, address.file, size, licenses, license, before)
            add = hub.CommitOperationAdd
            commit = api.create_commit(
                repository,
                [add(address.file, str(file)), add(CARD, card.encode())],
                commit_message=message or f"{len(content.tasks)} adapters, by hydraopt_jax",
                revision=revision,
                parent_commit=head,
            )
    return Pushed(repository, commit.oid, url, size, model_card.bases_of(content), licenses)


def old_card(hub: Any, repository: str, commit: str) -> str | None:
    """The text of a repository's model card; None if it has none."""
    try:
        return Path(hub.hf_hub_download(repository, CARD, revision=commit)).read_text(encoding="utf-8")
    except hub.errors.EntryNotFoundError:
        return None


def pull(
    name: str,
    path: files.Path_,
    *,
    tasks: Sequence[str] = (),
    base: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Pulled:
    """Write a store of the hub, or some of its tasks, to disk, completely or not at all.

    Args:
      name: ORG/NAME[/FILE.safetensors][@REVISION].
      path: a new folder, or a new file whose name ends in `.safetensors`.
      tasks: names of the tasks; only their data and the vectors that predict them are fetched. Empty for all.
      base: the required base model; None for any.
      overwrite: replace an existing store.
      progress: show the progress of the download.

    Raises:
      HydraOptError: no such store, no network, another base model, or a path that cannot be written.
    """
    address = address_of(name)
    files.check_output(path, overwrite)
    source = remote.find(address.text)
    content = portable.open_source(source)
    check_store_base(address.label, content, base)
    if tasks:
        content = removal.select(content, list(dict.fromkeys(named_tasks(content, tasks))))
    elif source.path is None:
        hub = network.client(address.label)
        with network.explained(address.label, "cannot be downloaded"), network.quiet(progress):
            fetch = functools.partial(hub.hf_hub_download, address.repository, address.file)
            copy = Path(fetch(revision=address.revision))
            if copy.stat().st_size != source.size:
                # half a file from before, or another commit
                copy = Path(fetch(revision=address.revision, force_download=True))
        commit = remote.commit_of(copy, address.file)
        source = remote.find(address._replace(revision=commit).text)
        content = portable.open_source(source)
        check_store_base(address.label, content, base)
    pinned = address._replace(revision=source.version)
    files.save(path, content, overwrite=overwrite)
    return Pulled(pinned.text, source.version, str(path), content.tasks, sizes.size_on_disk(path))
