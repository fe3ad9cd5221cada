"""Find the parts of a reward table that need the user's consent: code, servers, and the choice of a secret."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from diffalign.config.schema import Place
from diffalign.tokens import token_variable

CODE = re.compile(r"[^\s:]+:[A-Za-z_]\w*")  # module:function or file.py:function among a reward's options
MOST_VALUES = 10_000  # in one table; aliases of YAML can make a short file endless
TRUST = "set allow_reward_code if you trust it (type --allow_reward_code; a file cannot say it)"


def guard_rewards(table: Any, place: Place, consent: bool) -> None:
    """Refuse what a file may not decide about rewards; the guard of every field that names or configures some.

    Args:
        table: names in a list or in one text, or a mapping from names to weights or settings.
        place: where it stands, for messages.
        consent: whether the user typed ``--allow_reward_code``.

    Raises:
        ValueError: a ``token_env`` in any case; code or the address of a server without consent.
    """
    found = list(islice(_walk(table), MOST_VALUES))
    if len(found) == MOST_VALUES:
        raise place.error(f"more than {MOST_VALUES} values: name rewards and a few options of each")
    for path, value in found:
        if path[-1:] == ("token_env",) and value not in (None, "token_env"):
            raise _at(place, path).error(_about_token(table, path))
    for path, value in [] if consent else found:
        if what := danger(path, value):
            raise _at(place, path).error(f"{str(value)[:200]!r} is {what}: {TRUST}")


def _at(place: Place, path: tuple[str, ...]) -> Place:
    return Place(place.source, place.root, ".".join((place.path, *path)))


def needs_consent(table: Any) -> bool:
    """Return whether a table of rewards, as plain values, contains code or servers."""
    return any(danger(path, value) for path, value in _walk(table))


def danger(path: tuple[str, ...], value: Any) -> str:
    """Describe what a value of a reward table does beyond selecting registered rewards; empty if nothing."""
    if not isinstance(value, str):
        return ""
    if (path[-1:] == ("url",) and value != "url") or "://" in value:
        return "a server, which prompts and images would be sent to"
    names_reward = len(path) < 2 or path[-1] == "reward"
    return "code, which would be run" if (":" in value if names_reward else CODE.fullmatch(value)) else ""


def _about_token(table: Any, path: tuple[str, ...]) -> str:
    settings = table
    for name in path[:-1]:
        entries = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
        settings = next(entry for key, entry in entries if str(key) == name)
    url = settings.get("url") if isinstance(settings, Mapping) else None
    variable = (token_variable(url) if isinstance(url, str) else None) or "DIFFALIGN_TOKEN_<HOST>"
    return f"a file does not choose which secret is sent: leave it out, and set the environment variable {variable}"


def _walk(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every value with the keys that lead to it; keys of mappings are yielded as values too."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while waiting:
        path, value = waiting.pop()
        yield path, value
        if isinstance(value, Mapping):
            yield from (((*path, str(name)), str(name)) for name in value)
            waiting += [((*path, str(name)), entry) for name, entry in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [((*path, str(i)), entry) for i, entry in enumerate(value)]
