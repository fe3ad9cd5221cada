"""Select the token for a host, and keep tokens out of messages."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from urllib.parse import quote, urlsplit

PREFIX = "DIFFALIGN_TOKEN_"
HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
LEAST_ECHO = 8  # characters of a token in a row that no message shows
LONGEST_SAID = 300  # characters of a reply in a message


def check_url(url: str) -> str:
    """Return the host of ``url`` in lower case. ValueError: not http(s), no host, or a user name and password in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"url {printable(url)!r} is not one ({error}): write http://HOST:PORT") from error
    if parts.scheme not in ("http", "https") or not host or printable(url, len(url)) != url:
        raise ValueError(f"url {printable(url)!r}: write http://HOST:PORT or https://HOST")
    if "@" in parts.netloc:
        raise ValueError(f"the url of {host} holds a user name or a password: leave it out, and set {PREFIX}<HOST>")
    return host.lower()


def token_variable(url: str) -> str | None:
    """Return the environment variable of the token for a host: dots become ``_`` and hyphens ``__``.

    ``https://judge-1.example.com:8000`` has ``DIFFALIGN_TOKEN_JUDGE__1_EXAMPLE_COM``, and no other host has it. None
    for a host whose name is not made of letters, digits and hyphens, such as an IPv6 address.
    """
    try:
        host = check_url(url)
    except ValueError:
        return None
    return PREFIX + host.replace("-", "__").replace(".", "_").upper() if HOST.fullmatch(host) else None


def token_from(variable: str | None, who: str) -> str | None:
    """Read the token from an environment variable that the user named. Raises ValueError if it is not set."""
    if variable is None:
        return None
    if not (token := os.environ.get(variable)):
        raise ValueError(f"{who} needs a token: set the environment variable {variable}")
    return token


def token_for(url: str) -> str | None:
    """Read the token for the host of ``url``; None if its variable is not set."""
    variable = token_variable(url)
    return (os.environ.get(variable) or None) if variable else None


def printable(text: str, longest: int = LONGEST_SAID) -> str:
    """Put ``text`` on one line, without escapes, control and direction characters that a terminal would obey."""
    plain = (
        " " if char in "\n\r\t" else "?" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char for char in text
    )
    shown = "".join(plain).strip()
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."


def redacted(text: str, secrets: Sequence[str]) -> str:
    """Replace every secret in ``text`` by ``***``, also parts (``LEAST_ECHO`` characters) and percent-encoded ones."""
    forms = {form for one in secrets if one for form in (one, quote(one, safe=""))}
    for secret in sorted(forms, key=len, reverse=True):
        size = min(LEAST_ECHO, len(secret))
        pieces = {secret[i : i + size] for i in range(len(secret) - size + 1)}
        hidden: set[int] = set()
        for start in range(len(text) - size + 1):
            if text[start : start + size] in pieces:
                hidden.update(range(start, start + size))
        text = "".join("\0" if i in hidden else char for i, char in enumerate(text))
        text = re.sub("\0+", "***", text)
    return text
