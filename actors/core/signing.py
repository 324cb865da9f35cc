"""Ed25519 signatures over bytes: who holds the private key made them, and not one bit has changed since.

Keys are PEM texts that OpenSSL reads (PKCS #8, SubjectPublicKeyInfo), a signature is RFC 8032's 64 bytes, so that
``openssl pkeyutl -verify -pubin -inkey models.pub -rawin -in manifest.json -sigfile manifest.sig`` checks one by hand.
"""

from __future__ import annotations

import re
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

SEED_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

_BLOCK: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


class KeyUnusable(ValueError):
    """A text that is no Ed25519 key; the message says so in a few words."""


def private_key(seed: bytes) -> bytes:
    """The private key that :data:`SEED_BYTES` random bytes give, as PEM: the caller's chance decides, not this core."""
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_key(private: bytes) -> bytes:
    """The public half of a private key, both PEM. Raises KeyUnusable."""
    return _private(private).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sign(private: bytes, data: bytes) -> bytes:
    """The signature over ``data``, the same each time. Raises KeyUnusable."""
    return _private(private).sign(data)


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Whether one of the keys in ``public`` (PEM, one after the other) made the signature. Raises KeyUnusable."""
    return any(_made(key, data, signature) for key in _public(public))


def knows(public: bytes, private: bytes) -> bool:
    """Whether ``public`` holds the public half of ``private``. Raises KeyUnusable."""
    raw = _private(private).public_key().public_bytes_raw()
    return any(key.public_bytes_raw() == raw for key in _public(public))


def _made(key: Ed25519PublicKey, data: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _private(pem: bytes) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:  # TypeError: it is encrypted
        raise KeyUnusable("it holds no private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnusable("its key is not an Ed25519 one")
    return key


def _public(pem: bytes) -> list[Ed25519PublicKey]:
    keys = []
    for block in _BLOCK.findall(pem):
        try:
            key = load_pem_public_key(block)
        except ValueError as error:
            raise KeyUnusable("it holds no public key in PEM") from error
        if not isinstance(key, Ed25519PublicKey):
            raise KeyUnusable("its key is not an Ed25519 one")
        keys.append(key)
    if not keys:
        raise KeyUnusable("it holds no public key in PEM")
    return keys
