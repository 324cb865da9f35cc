"""The key pair that versions are signed with: made once, the private half for this user's eyes only."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from actors.core import signing

PRIVATE_FILE: Final = "models.key"
PUBLIC_FILE: Final = "models.pub"
CLOSED: Final = 0o600


class KeysUnusable(Exception):
    """The keys cannot be used; the message says which file and what to do."""


def signing_key(folder: Path, named: Path | None = None) -> bytes:
    """The private key in ``folder``, PEM; made there where there is none, and its public half beside it.

    ``named`` is the file where readers look for public keys, where that is not beside the private one: it is written where
    it does not exist, and must hold ours where it does. Beside the private key, a ``models.pub`` of former keys gets ours
    too, so that what they signed goes on being verified.

    Raises:
        KeysUnusable: a file cannot be read or written, is open to others, or holds something else.
    """
    try:
        private = _private(folder / PRIVATE_FILE)
        beside = folder / PUBLIC_FILE
        _publish(beside, private, add=True)
        if named is not None and named.absolute() != beside.absolute():
            _publish(named, private, add=False)
    except OSError as error:
        raise KeysUnusable(
            f"{error.filename or folder} cannot be used ({error.strerror}): the trainer needs it to sign models; mend its "
            "permissions."
        ) from error
    return private


def _private(path: Path) -> bytes:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        _write(draft, signing.private_key(secrets.token_bytes(signing.SEED_BYTES)), CLOSED)
        try:
            os.link(draft, path)  # unlike a rename it never takes the place of a key that another process has made
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        _sync(path.parent)
    if path.stat().st_mode & 0o077:
        raise KeysUnusable(f"{path} can be read by others: chmod 600 it, or, if others may have had it, delete it.")
    private = path.read_bytes()
    try:
        signing.public_key(private)
    except signing.KeyUnusable as error:
        raise KeysUnusable(
            f"{path} is no signing key, {error}: delete it, and the trainer makes another one."
        ) from error
    return private


def _publish(path: Path, private: bytes, *, add: bool) -> None:
    known = path.read_bytes() if path.exists() else b""
    try:
        if known and signing.knows(known, private):
            return
    except signing.KeyUnusable as error:
        raise KeysUnusable(f"{path} is no public key, {error}: delete it, and the trainer writes it anew.") from error
    if known and not add:
        raise KeysUnusable(
            f"{path} has not the key that this trainer signs with, so nobody would load its models: add the trainer's "
            f"keys/{PUBLIC_FILE} to it, or delete it and the trainer writes it."
        )
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    _write(draft, signing.public_key(private) + known, 0o644)
    draft.replace(path)
    _sync(path.parent)


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
