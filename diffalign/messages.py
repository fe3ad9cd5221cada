"""Explain errors that the user can fix in a sentence: what is wrong, and what to try."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

LONGEST = 1900
REPOSITORY = re.compile(r"huggingface\.co/(?:api/)?(?:models/|datasets/)?([\w.-]+/[\w.-]+)|https?://[^/\s]+/(?:api/models/)?"
                        r"([\w.-]+/[\w.-]+)/(?:resolve|tree|revision)")  # fmt: skip
QUOTED = re.compile(r"[`'\"]([\w.-]+/[\w.-]+)[`'\"]")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
# Names of exceptions of huggingface_hub, datasets and their HTTP clients: none of them is imported for this.
CONNECTION = frozenset(
    {"ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "MaxRetryError", "NameResolutionError"}
    | {"ProxyError", "Timeout", "TimeoutException", "NetworkError", "gaierror", "SSLError"}
)
NO_FILE = frozenset({"EntryNotFoundError", "RemoteEntryNotFoundError"})


def bounded(text: str) -> str:
    """Cut a message to less than 2,000 characters."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


def explain(error: BaseException) -> str | None:
    """Return the message for the user; None for errors of the program, which need a traceback."""
    if (text := hub_sentence(error)) is not None:
        # Our own messages begin with what they are about, as "reward 'pickscore'".
        about = re.match(r"reward '[^']*'", str(error))
        return bounded(f"{about[0]}: {text}" if about else text)
    if isinstance(error, OSError) and error.filename and error.strerror and not hasattr(error, "exit_code"):
        return bounded(f"{error.filename}: {error.strerror}; check the path and its permissions")
    if isinstance(error, (ValueError, FileNotFoundError)) or hasattr(error, "exit_code"):
        return bounded(str(error))
    return None


def hub_sentence(error: BaseException, name: str = "") -> str | None:
    """Explain an error of the hub or the network; None for any other error.

    name: of the repository; by default it is extracted from the messages.
    """
    causes = list(_causes(error))
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    texts = " ".join(str(cause) for cause in causes)
    # A library may have wrapped its error in our own sentence, which says more.
    addresses = " ".join(str(getattr(getattr(cause, "response", None), "url", "")) for cause in causes)
    name = name or _repository(texts) or _repository(addresses)
    what = f"{name!r}" if name else "a repository"
    if "GatedRepoError" in kinds:
        place = f"https://huggingface.co/{name}" if name else "its page on huggingface.co"
        return f"{what} is gated: accept its licence at {place}, then log in with `hf auth login` (or set HF_TOKEN)"
    if "RevisionNotFoundError" in kinds:
        return f"{what} has no such revision: check the branch, tag or commit (--revision)"
    if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds:
        return (
            f"{what} is not on the hub: check the spelling (owner/name, or a folder of this machine); "
            "for a private one log in with `hf auth login`"
        )
    if "HFValidationError" in kinds:
        return f"{what} is neither a folder here nor an id of the hub (owner/name): check the path"
    if "OfflineModeIsEnabled" in kinds or ("LocalEntryNotFoundError" in kinds and is_offline()):
        return offline_sentence(what)
    if "LocalEntryNotFoundError" in kinds or kinds & CONNECTION or "couldn't connect to" in texts.lower():
        return offline_sentence(what) if is_offline() else network_sentence(what)
    if kinds & NO_FILE:
        return f"{what} lacks a file that is needed ({_first_line(texts)}): check the repository and its revision"
    if "HfHubHTTPError" in kinds:
        return f"the hub refused to serve {what} ({_first_line(texts)}): try again later, or use a local folder"
    if "is not a local folder" in texts and "valid model identifier" in texts:
        return offline_sentence(what) if is_offline() else network_sentence(what)
    return None


def is_offline() -> bool:
    """Return whether the environment turns on offline mode."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in OFFLINE)


def offline_sentence(what: str) -> str:
    """Explain that offline mode is on and the cache lacks ``what``."""
    switches = " and ".join(f"{name}={os.environ[name]}" for name in OFFLINE if os.environ.get(name))
    return (
        f"{what} is not in the local cache, and {switches or 'offline mode'} forbids to download it: unset it, or "
        "download before with `hf download`, or give a local folder"
    )


def network_sentence(what: str) -> str:
    """Explain that the hub cannot be reached."""
    return (
        f"{what} is not in the local cache, and the hub cannot be reached: check the network and its proxy, or "
        "download on another machine with `hf download` and give the folder"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _repository(text: str) -> str:
    for pattern in (REPOSITORY, QUOTED):
        if found := pattern.search(text):
            return next(filter(None, found.groups())).removesuffix("/resolve")
    return ""


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")[:200]
