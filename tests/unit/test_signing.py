"""Signatures, keys and what is verified before a version's bytes are parsed."""

from __future__ import annotations

import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from actors.core import signing
from actors.core.manifest import Manifest, ModelFile, ModelRefused, recipe_name
from actors.core.sealed import check_file, open_manifest
from actors.workshop.keys import KeysUnusable, signing_key
from tests.unit.test_serving import MANIFEST

KEY, OTHER = (signing.private_key(bytes([n]) * signing.SEED_BYTES) for n in (1, 2))
PUBLIC, STRANGE = signing.public_key(KEY), signing.public_key(OTHER)
GRAPH = b"a graph"
DATA = msgspec.json.encode(
    msgspec.structs.replace(
        MANIFEST, files={"model.onnx": ModelFile(sha256=sha256(GRAPH).hexdigest(), size=len(GRAPH))}
    )
)


def opened(data: bytes = DATA, signature: bytes | None = None, public: bytes = PUBLIC, version: str = "") -> Manifest:
    name = version or MANIFEST.version
    return open_manifest("rf_m1", name, data, signing.sign(KEY, data) if signature is None else signature, public)


def test_rfc_8032_says_the_same() -> None:
    """Its test 2: a message of one byte."""
    key = signing.private_key(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    signature = signing.sign(key, b"\x72")
    assert signature.hex().startswith("92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da")
    assert signing.verify(signing.public_key(key), b"\x72", signature)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_by_hand_what_we_sign(tmp_path: Path) -> None:
    for name, data in (("m", DATA), ("sig", signing.sign(KEY, DATA)), ("pub", PUBLIC)):
        (tmp_path / name).write_bytes(data)
    words = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "pub", "-rawin", "-in", "m", "-sigfile", "sig"]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    (tmp_path / "m").write_bytes(DATA + b" ")
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode != 0


def test_one_bit_more_or_less_is_another_manifest() -> None:
    signature = signing.sign(KEY, DATA)
    assert opened() == msgspec.json.decode(DATA, type=Manifest)
    for i in range(len(DATA)):
        data = bytearray(DATA)
        data[i] ^= 1 << i % 8
        with pytest.raises(ModelRefused, match=r"manifest\.sig .* does not fit"):
            opened(bytes(data), signature)
    for i in range(len(signature)):
        broken = bytearray(signature)
        broken[i] ^= 1 << i % 8
        assert not signing.verify(PUBLIC, DATA, bytes(broken))
    for broken in (b"", signature[:-1], signature + b"\0", signing.sign(OTHER, DATA)):
        with pytest.raises(ModelRefused, match=r"models\.pub from the machine that trained it"):
            opened(DATA, bytes(broken))


def test_a_signed_manifest_counts_for_its_own_version_only() -> None:
    with pytest.raises(ModelRefused, match="is that of rf_m1"):
        opened(version="20240102T000000Z-00000000")
    with pytest.raises(ModelRefused, match="cannot be read"):
        opened(b"{}")


def test_former_keys_go_on_verifying() -> None:
    assert opened(public=STRANGE + PUBLIC) == opened(public=PUBLIC + STRANGE)
    with pytest.raises(ModelRefused):
        opened(public=STRANGE)


def test_a_key_that_is_none_is_told() -> None:
    foreign = ec.generate_private_key(ec.SECP256R1())
    public = foreign.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    private = foreign.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    broken = PUBLIC.replace(b"MCow", b"Mxow")
    for bad in (b"", b"no key", public, broken):
        with pytest.raises(ModelRefused, match=r"take models\.pub from the trainer's keys folder"):
            opened(public=bad)
    for bad in (b"", PUBLIC, private):
        with pytest.raises(signing.KeyUnusable):
            signing.sign(bad, DATA)


def test_a_file_is_the_one_that_the_manifest_names() -> None:
    check_file(opened(), "model.onnx", GRAPH)
    for name, data in (("model.onnx", GRAPH + b"\0"), ("model.onnx", b"A graph"), ("model.pkl", GRAPH)):
        with pytest.raises(ModelRefused, match=r"is not the one its manifest names: train again\."):
            check_file(opened(), name, data)


# --- the key pair ------------------------------------------------------------------------------------------------


def test_the_first_start_makes_the_keys_and_the_second_finds_them(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    old = os.umask(0)
    try:
        key = signing_key(folder)
    finally:
        os.umask(old)
    assert signing_key(folder) == key
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"models.key": 0o600, "models.pub": 0o644}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert signing.verify((folder / "models.pub").read_bytes(), b"x", signing.sign(key, b"x"))
    assert signing_key(tmp_path / "others") != key


def test_a_new_key_joins_the_former_ones(tmp_path: Path) -> None:
    signature = signing.sign(signing_key(tmp_path), DATA)
    (tmp_path / "models.key").unlink()
    fresh = signing.sign(signing_key(tmp_path), DATA)
    public = (tmp_path / "models.pub").read_bytes()
    assert fresh != signature
    assert opened(DATA, signature, public) == opened(DATA, fresh, public)


def test_the_file_that_readers_look_at_is_written_or_must_fit(tmp_path: Path) -> None:
    named = tmp_path / "shared" / "models.pub"
    key = signing_key(tmp_path / "keys", named)
    assert named.read_bytes() == signing.public_key(key)
    named.write_bytes(STRANGE)
    with pytest.raises(KeysUnusable, match=r"add the trainer's keys/models\.pub to it"):
        signing_key(tmp_path / "keys", named)
    named.write_bytes(STRANGE + signing.public_key(key))
    assert signing_key(tmp_path / "keys", named) == key


def test_keys_that_cannot_be_trusted_are_told(tmp_path: Path) -> None:
    signing_key(tmp_path)
    (tmp_path / "models.key").chmod(0o640)
    with pytest.raises(KeysUnusable, match="can be read by others: chmod 600"):
        signing_key(tmp_path)
    (tmp_path / "models.key").chmod(0o600)
    (tmp_path / "models.pub").write_bytes(b"no key")
    with pytest.raises(KeysUnusable, match=r"models\.pub is no public key"):
        signing_key(tmp_path)
    (tmp_path / "models.key").write_bytes(b"no key")
    with pytest.raises(KeysUnusable, match=r"models\.key is no signing key"):
        signing_key(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KeysUnusable, match="mend its permissions"):
        signing_key(tmp_path / "file" / "keys")


# --- recipes -----------------------------------------------------------------------------------------------------


def test_a_recipe_is_how_and_not_of_what() -> None:
    options = {"seed": 1, "trees": 200, "max_depth": 8, "folds": 5, "points": {"EURUSD": 1e-5}, "min_rows": 5_000}
    report = {"feature_set": "scale_free_v1", "inputs": ("a", "b"), "options": options, "rows": 10}
    recipe = recipe_name(report, "M1")
    assert len(recipe) == 12
    same = {"seed": 2, "folds": 3, "points": {}, "min_rows": 1, "spreads": {"X": 1.0}}
    assert recipe_name(report | {"options": options | same, "rows": 20, "inputs": ["a", "b"]}, "M1") == recipe
    others = [
        recipe_name(report | {"options": options | {"trees": 100}}, "M1"),
        recipe_name(report | {"options": options | {"new_knob": True}}, "M1"),
        recipe_name(report | {"feature_set": "scale_free_v2"}, "M1"),
        recipe_name(report, "M5"),
    ]
    assert len({recipe, *others}) == 5
