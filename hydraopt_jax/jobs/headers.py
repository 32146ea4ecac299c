"""Open a collection: each adapter is checked once, all its values included, by one of the processes."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hydraopt_jax.collection import Card, Collection
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.formats.peft_collection import collection_of, open_adapter
from hydraopt_jax.jobs.place import read_json, write_json
from hydraopt_jax.rate_control.work import Processes
from hydraopt_jax.reading import NamedPath
from hydraopt_jax.store.job_folder import check_job

# number of files that are read and hashed at once
READERS = 2


def read_headers(
    sources: Sequence[NamedPath],
    folder: Path,
    *,
    skip_bad: bool = False,
    processes: Processes | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Collection, dict[str, str]]:
    """The collection of some sources, checked; and the adapters left out, with the reason.

    Args:
      sources: place of each adapter, and its task's name or None.
      folder: of the job, with the results of earlier checks.
      skip_bad: leave out adapters that cannot be read instead of raising.
      processes: the processes of the job; each checks its share.
      advance: called after each adapter.

    Raises:
      HydraOptError: a bad adapter, named; or a folder of the user in the job's place.
    """
    processes = processes or Processes()
    check_job(folder)
    known: dict[str, Any] = {}
    for file in folder.glob("checked-*.json"):
        known |= read_json(file)["known"]
    bad: dict[str, str] = {}
    mine: dict[str, Any] = {}
    cards: dict[int, Card] = {}
    seen: dict[Any, Any] = {}

    def open_one(n: int) -> Card | HydraOptError:
        try:
            return open_adapter(*sources[n], known, seen)
        except HydraOptError as error:
            return error

    share = range(processes.rank, len(sources), processes.size)
    # reading and hashing release the interpreter lock
    pool = ThreadPoolExecutor(READERS)
    try:
        for n, card in zip(share, pool.map(open_one, share), strict=True):
            if isinstance(card, Card):
                cards[n] = card
                mine[card.file] = [card.stamp, card.digest]
            elif skip_bad:
                bad[sources[n][0]] = str(card)
            else:
                raise card
            advance()
    finally:
        pool.shutdown(cancel_futures=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"checked-{processes.rank}.json", {"known": mine, "bad": bad})
    processes.wait("checked")
    for rank in range(processes.size):
        said = read_json(folder / f"checked-{rank}.json")
        known |= said["known"]
        bad |= said["bad"]
    for n, (source, task) in enumerate(sources):
        if n not in cards and source not in bad:
            cards[n] = open_adapter(source, task, known, seen)
    chosen = [cards[n] for n in sorted(cards)]
    if skip_bad:
        bad |= odd_ones(chosen)
        chosen = [x for x in chosen if x.source not in bad]
        if not chosen:
            raise HydraOptError(f"no adapter is left: {next(iter(bad.values()))}")
    return collection_of(chosen), {s: bad[s] for s, _ in sources if s in bad}


def odd_ones(cards: Sequence[Card]) -> Mapping[str, str]:
    """Adapters with a module whose shape differs from that in most adapters."""
    votes: dict[str, Counter] = {}
    for card in cards:
        for name, entry in card.modules.items():
            votes.setdefault(name, Counter())[entry.inputs, entry.outputs] += 1
    usual = {name: count.most_common(1)[0][0] for name, count in votes.items()}
    out = {}
    for card in cards:
        for name, entry in card.modules.items():
            shape = (entry.inputs, entry.outputs)
            if shape != usual[name]:
                out[card.source] = f"{name} has [in, out] = {list(shape)}, most have {list(usual[name])}"
                break
    return out
