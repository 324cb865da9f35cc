"""What is loaded and what is not: refusals on a real object store while the champion serves, restores, the pickle that waits."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import onnxruntime
import pytest

from actors.artifacts import Artifacts
from actors.core import signing
from actors.core.manifest import MANIFEST_FILE, ONNX_FILE, PICKLE_FILE, SIGNATURE_FILE, ModelFile, ModelRefused
from actors.emitter import Emitter
from actors.features import Features
from actors.workshop import shelf
from bus.client import Bus
from bus.subjects import MODEL_FILES, MODELS, SIGNALS
from schema.messages import ModelEvent
from schema.settings import Models, Settings
from tests.builders import TRUSTING, put, read_until, running, walk
from tests.models import KEY, changed, files, manifest_of, release, signed, store

STRANGE = signing.private_key(bytes(signing.SEED_BYTES))


def without(artifacts: Mapping[str, bytes], name: str) -> dict[str, bytes]:
    return {file: data for file, data in artifacts.items() if file != name}


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def bad_versions() -> dict[str, tuple[dict[str, bytes], str]]:
    """A version each, spoilt in its own way, with what the refusal says; the manifests' names stay readable."""
    seeds = iter(range(3, 12))

    def fresh(**changes: Any) -> dict[str, bytes]:
        """The same model under a version of its own."""
        made = files(2)
        return changed(made, version=f"2025010{next(seeds)}T000000Z-00000000", **changes)

    graph, manifest, key, library = fresh(), fresh(), fresh(), fresh(libraries={"onnxruntime": "1.0.0"})
    data = manifest[MANIFEST_FILE]
    at = data.index(b'"threshold"') + 1  # a letter of a key: it is still JSON
    return {
        "graph": (graph | {ONNX_FILE: files(1)[ONNX_FILE]}, "model.onnx of rf_m1 .* train again"),
        "graph's last byte": (
            (last := fresh()) | {ONNX_FILE: flipped(last[ONNX_FILE], -1 % len(last[ONNX_FILE]))},
            "model.onnx of rf_m1 .* is not the one its manifest names: train again",
        ),
        "manifest": (
            manifest | {MANIFEST_FILE: flipped(data, at)},
            "it was changed, or signed with a key .* train again",
        ),
        "signature": (
            key | {SIGNATURE_FILE: signing.sign(STRANGE, key[MANIFEST_FILE])},
            "signed with a key that is not in",
        ),
        "unsigned": (without(fresh(), SIGNATURE_FILE), "manifest.sig is not in the object store, and nothing unsigned"),
        "feature set": (fresh(feature_set="scale_free_v0"), "needs the feature set scale_free_v0, .* or upgrade"),
        "library": (
            library,
            rf"made with onnxruntime 1\.0\.0 and {onnxruntime.__version__} is installed: train again .* onnxruntime==1\.0\.0",
        ),
    }


@pytest.mark.timeout(240)
async def test_what_cannot_be_trusted_is_refused_in_a_sentence_and_the_champion_keeps_serving(
    bus: Bus, nats_url: str
) -> None:
    rows = walk(340)
    bad = bad_versions()

    def answered(count: int) -> Any:
        return lambda events: sum(e.event in ("activated", "refused") for e in events) >= count

    async with running(Features, Emitter, nats_url=nats_url, settings=TRUSTING):
        await put(bus, rows[:300], history=True)
        champion = await release(bus, files(1), "champion")
        await read_until(bus, MODELS, answered(1))
        for i, (artifacts, _) in enumerate(bad.values()):
            await put(bus, rows[300 + i : 301 + i])
            await release(bus, artifacts, "champion")
            await read_until(bus, MODELS, answered(2 + i))
        await put(bus, rows[310:], size=1)
        found = await read_until(bus, SIGNALS, lambda signals: len(signals) >= len(bad) + 30)
    assert {s.model_version for s in found} == {champion}
    events: list[ModelEvent] = await read_until(bus, MODELS, answered(1 + len(bad)))
    answers = [e for e in events if e.event in ("activated", "refused")]
    assert [e.event for e in answers] == ["activated", *["refused"] * len(bad)]
    for answer, (artifacts, sentence) in zip(answers[1:], bad.values(), strict=True):
        assert answer.version == manifest_version(artifacts)
        assert msgspec.json.encode(answer.reason).count(b"\\n") == 0
        with pytest.raises(ModelRefused, match=sentence):
            raise ModelRefused(answer.reason)


def manifest_version(artifacts: Mapping[str, bytes]) -> str:
    return str(msgspec.json.decode(artifacts[MANIFEST_FILE])["version"])


async def test_without_a_public_key_nothing_is_loaded_and_the_sentence_says_where_it_belongs(
    bus: Bus, tmp_path: Path
) -> None:
    manifest = await store(bus, files())
    for settings in (
        Settings(home=str(tmp_path)),
        Settings(models=Models(public_key=str(tmp_path / "keys/models.pub"))),
    ):
        with pytest.raises(ModelRefused) as refused:
            await Artifacts(bus, settings).load(manifest.name, manifest.version)
        assert f"{tmp_path / 'keys' / 'models.pub'}, cannot be read" in str(refused.value)
        assert "[models] public_key" in str(refused.value)


async def test_a_manifest_of_another_version_does_not_pass_for_this_one(bus: Bus) -> None:
    """Somebody who can write to the object store, and has no key, puts an older version in a newer one's place."""
    old, new = files(1), manifest_of(files(2))
    await store(bus, files(2))
    for name, data in old.items():
        await bus.put_object(f"rf_m1/{new.version}/{name}", data)
    with pytest.raises(ModelRefused, match=f"is that of rf_m1 {manifest_of(old).version}"):
        await Artifacts(bus, TRUSTING).load("rf_m1", new.version)


async def test_loads_are_kept_up_to_a_bound(bus: Bus) -> None:
    versions = [(await store(bus, files(seed))).version for seed in (1, 2, 3)]
    artifacts = Artifacts(bus, TRUSTING, kept=2)
    first, second = [await artifacts.load("rf_m1", version) for version in versions[:2]]
    assert await artifacts.load("rf_m1", versions[0]) is first
    await artifacts.load("rf_m1", versions[2])
    assert await artifacts.load("rf_m1", versions[0]) is first
    assert await artifacts.load("rf_m1", versions[1]) is not second, "the one that was asked for longest ago has gone"


async def test_a_version_is_restored_from_the_object_store_whole_and_verified(bus: Bus, tmp_path: Path) -> None:
    made = files()
    manifest = await store(bus, made)
    artifacts = Artifacts(bus, TRUSTING)
    folder = tmp_path / manifest.name / manifest.version
    assert sorted(await shelf.restore(artifacts, tmp_path, manifest.name, manifest.version)) == sorted(made)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
    assert await shelf.restore(artifacts, tmp_path, manifest.name, manifest.version) == []
    (folder / ONNX_FILE).write_bytes(flipped(made[ONNX_FILE], 9))
    (folder / PICKLE_FILE).unlink()
    written = await shelf.restore(artifacts, tmp_path, manifest.name, manifest.version)
    assert sorted(written) == [ONNX_FILE, PICKLE_FILE]
    await shelf.prune(bus, tmp_path, manifest.name, manifest.version, everything=False)
    await shelf.prune(bus, tmp_path, manifest.name, manifest.version, everything=False)
    assert {path.name for path in folder.iterdir()} == set(without(made, PICKLE_FILE))
    (folder / ONNX_FILE).unlink()
    assert await shelf.restore(artifacts, tmp_path, manifest.name, manifest.version) == [ONNX_FILE]
    await bus.put_object(f"rf_m1/{manifest.version}/{ONNX_FILE}", flipped(made[ONNX_FILE], 9))
    with pytest.raises(ModelRefused, match="is not the one its manifest names"):
        await shelf.restore(artifacts, tmp_path, manifest.name, manifest.version)
    assert (folder / ONNX_FILE).read_bytes() == made[ONNX_FILE]
    await shelf.prune(bus, tmp_path, manifest.name, manifest.version, everything=True)
    assert list(folder.parent.iterdir()) == []
    chunks = await bus.js.stream_info(f"OBJ_{MODEL_FILES}", subjects_filter=f"$O.{MODEL_FILES}.C.>")
    assert not chunks.state.subjects, "nothing is left in the object store"


class Canary:
    """A pickle that sings: whoever loads it makes a file."""

    def __init__(self, song: Path) -> None:
        self.song = song

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.song,)


async def test_whoever_serves_never_loads_a_pickle(bus: Bus, nats_url: str, tmp_path: Path) -> None:
    song = tmp_path / "song"
    made = files() | {PICKLE_FILE: pickle.dumps(Canary(song))}
    manifest = manifest_of(made)
    song_file = ModelFile(sha256=sha256(made[PICKLE_FILE]).hexdigest(), size=len(made[PICKLE_FILE]))
    made = signed(made, msgspec.structs.replace(manifest, files={**manifest.files, PICKLE_FILE: song_file}))
    rows = walk(320)
    async with running(Features, Emitter, nats_url=nats_url, settings=TRUSTING):
        await put(bus, rows[:300], history=True)
        await release(bus, made)
        await read_until(bus, MODELS, lambda events: any(e.event == "activated" for e in events))
        await put(bus, rows[300:310], size=1)
        await read_until(bus, SIGNALS, lambda signals: len(signals) >= 10)
    async with running(Features, Emitter, nats_url=nats_url, settings=TRUSTING):  # and at a start
        await put(bus, rows[310:], size=1)
        found = await read_until(bus, SIGNALS, lambda signals: len(signals) >= 20)
    assert {s.model_version for s in found} == {manifest.version}
    artifacts = Artifacts(bus, TRUSTING)
    await artifacts.load(manifest.name, manifest.version)
    await shelf.restore(artifacts, tmp_path, manifest.name, manifest.version)
    assert not song.exists()
    pickle.loads((tmp_path / manifest.name / manifest.version / PICKLE_FILE).read_bytes())
    assert song.exists(), "it would have been heard"


def test_the_tests_own_keys_belong_together() -> None:
    assert signing.knows(Path(str(TRUSTING.models.public_key)).read_bytes(), KEY)
