"""The hub's client, and one-line network errors without tokens, passwords and signatures."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydraopt_jax.errors import HydraOptError, one_line


def redact(text: str) -> str:
    """The text with tokens, passwords and signatures removed.

    >>> redact("GET https://me:pass@hub.org/x?sig=1 with Bearer hf_abcdefgh failed")
    'GET https://hub.org/x with Bearer *** failed'
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        known = os.environ.get(name, "").strip()
        text = text.replace(known, "***") if known else text
    text = re.sub(r"(?i)\b(bearer|basic)\s+[^\s'\"]+", r"\1 ***", text)
    text = re.sub(r"\bhf_\w{4,}", "***", text)
    return re.sub(r"(https?://)(?:[^\s/@'\"]*@)?([^\s?#'\"]*)[?#]?[^\s'\"]*", r"\1\2", text)


def client(label: str) -> Any:
    """The package huggingface_hub.

    Raises:
      HydraOptError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise HydraOptError(
            f"{label}: needs huggingface_hub: install the hub extra, or download the files yourself"
        ) from None
    return huggingface_hub


# kind of error, by the name of its class -> what it means
MEANINGS = {
    "OfflineModeIsEnabled": "offline (HF_HUB_OFFLINE is set), and it is not in the cache",
    "GatedRepoError": "the repository is gated: accept its terms on the hub and set HF_TOKEN",
    "RepositoryNotFoundError": "no such repository, or a private one: check the name and HF_TOKEN",
    "RevisionNotFoundError": "the repository has no such revision",
    "RemoteEntryNotFoundError": "the repository has no such file",
    "LocalEntryNotFoundError": "the hub cannot be reached, and it is not in the cache: try again later",
    "LocalTokenNotFoundError": "no token: set HF_TOKEN, or run hf auth login",
    "ConnectError": "no connection: check the network",
    "ConnectTimeout": "no connection: check the network",
    "TimeoutException": "no answer in time: try again",
}
STATUS = {
    401: "not allowed: set HF_TOKEN to a valid token, or run hf auth login",
    403: "not allowed: the token has no right to this; one with the right to write is needed to push",
    404: "no such file",
    412: "the repository was changed meanwhile: try again",
}


def meaning(error: BaseException) -> str:
    """One line that explains an error of the network or the hub, without secrets."""
    causes = [error]
    while (following := causes[-1].__cause__) is not None and len(causes) < 8:
        causes.append(following)
    # being offline is the cause of any other message
    names = [x.__name__ for y in causes for x in type(y).__mro__]
    if "OfflineModeIsEnabled" in names:
        return MEANINGS["OfflineModeIsEnabled"]
    for name in (x.__name__ for x in type(error).__mro__):
        if name in MEANINGS:
            return MEANINGS[name]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in STATUS:
        return STATUS[status]
    said = redact(one_line(causes[-1]))[:200]
    return f"the server says {status}: {said}" if status else said or type(error).__name__


@contextmanager
def explained(label: str, what: str) -> Iterator[None]:
    """Turn network errors, of which the hub's client has many classes, into one-line errors."""
    try:
        yield
    except (HydraOptError, MemoryError):
        raise
    except Exception as error:
        raise HydraOptError(f"{label}: {what}: {meaning(error)}") from None


@contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Suppress warnings of the hub's client, and its progress bars unless asked for."""
    from huggingface_hub import utils

    level, shown = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    utils.logging.set_verbosity_error()
    if not progress:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(level)
        if shown and not progress:
            utils.enable_progress_bars()
