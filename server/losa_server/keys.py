"""API keys: where they come from, and whose a presented one is. Keeps hashes only; knows no HTTP."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import SecretStr

from losa_runtime.core.errors import ConfigError
from losa_server.settings import ServerSettings
from losa_server.visit import Caller

_KEY = re.compile(r"[!-9;-~]{1,512}")  # visible ASCII without the colon, which separates fields in a key file
SECRET_VARIABLES = ("LOSA_API_KEY", "LOSA_ADMIN_API_KEY")  # not for the processes that the server starts
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)


class Key(NamedTuple):
    """digest: SHA-256 of the key."""

    digest: bytes
    caller: Caller


class Keyring:
    """The keys of a server; without any, everybody may use it.

    manage_without_keys: what everybody may do then includes managing the server (true where only this machine can
    reach it).
    """

    def __init__(self, keys: Iterable[Key] = (), manage_without_keys: bool = True) -> None:
        self._keys = tuple(keys)
        self._anybody = Caller(admin=manage_without_keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """The keys that the settings name. Raises ConfigError, which never shows a key."""
        keys = [
            *_single(settings.api_key, "api_key", Caller("user", admin=False)),
            *_single(settings.admin_api_key, "admin_api_key", Caller("admin")),
            *_from_file(settings.api_key_file),
        ]
        if len({key.digest for key in keys}) < len(keys):
            raise ConfigError("api_key: the same key is given twice, allowed: each key once")
        if len(keys) == 1:  # a server with one key has one user, who may manage it, too
            keys = [Key(keys[0].digest, Caller(keys[0].caller.name, keys[0].caller.salt))]
        return cls(keys, manage_without_keys=settings.local)

    def caller(self, presented: str | None) -> Caller | None:
        """Whose key this is; None for nobody's. Takes equally long whatever is presented."""
        if not self._keys:
            return self._anybody
        digest = _digest((presented or "").encode())
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _single(secret: SecretStr | None, name: str, caller: Caller) -> Iterator[Key]:
    if secret is None:
        return
    value = secret.get_secret_value()
    if not _KEY.fullmatch(value):
        raise ConfigError(f"{name}: found {len(value)} characters, allowed: 1 to 512 visible ASCII ones without colon")
    yield Key(_digest(value.encode()), caller)


def _from_file(path: Path | None) -> Iterator[Key]:
    """Lines `name:key` or `name:key:salt`; empty ones and those that begin with # are skipped.

    The salt is the name unless it is given: names share cached prefixes with themselves only.
    """
    if path is None:
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file: {path} cannot be read: {error}") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, line) for number, line in found if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"api_key_file: {path} holds no key, allowed: lines name:key or name:key:salt")
    for number, line in found:
        name, key, salt = (*line.split(":", 2), "", "")[:3]
        if not _NAME.fullmatch(name) or not _KEY.fullmatch(key) or len(salt) > 256:
            raise ConfigError(f"api_key_file: line {number} of {path} is not name:key or name:key:salt")
        yield Key(_digest(key.encode()), Caller(name, salt or name, admin=False))
