"""A version's files of unknown origin: nothing is parsed, let alone loaded, before its signature or hash was checked.

The signature covers the manifest, and the manifest names each file's SHA-256: one key vouches for them all.
"""

from __future__ import annotations

from hashlib import sha256

import msgspec

from actors.core import signing
from actors.core.manifest import MANIFEST_FILE, SIGNATURE_FILE, Manifest, ModelRefused


def open_manifest(name: str, version: str, data: bytes, signature: bytes, public: bytes) -> Manifest:
    """The manifest of that version, from the bytes of ``manifest.json`` and ``manifest.sig``.

    Raises:
        ModelRefused: none of the ``public`` keys signed these bytes, or they are another version's manifest.
    """
    try:
        signed = signing.verify(public, data, signature)
    except signing.KeyUnusable as error:
        raise ModelRefused(
            f"The public key of models cannot be used, {error}: take models.pub from the trainer's keys folder."
        ) from error
    if not signed:
        raise ModelRefused(
            f"{SIGNATURE_FILE} of {name} {version} does not fit its {MANIFEST_FILE}: it was changed, or signed with a key "
            "that is not in models.pub; train again, or take models.pub from the machine that trained it."
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise ModelRefused(f"{MANIFEST_FILE} of {version} cannot be read ({error}): train again.") from error
    if (manifest.name, manifest.version) != (name, version):
        raise ModelRefused(
            f"{MANIFEST_FILE} of {name} {version} is that of {manifest.name} {manifest.version}: train again."
        )
    return manifest


def check_file(manifest: Manifest, file: str, data: bytes) -> None:
    """Raises ModelRefused where the bytes are not those that the manifest names."""
    expected = manifest.files.get(file)
    if expected is None or len(data) != expected.size or sha256(data).hexdigest() != expected.sha256:
        raise ModelRefused(
            f"{file} of {manifest.name} {manifest.version} is not the one its manifest names: train again."
        )
