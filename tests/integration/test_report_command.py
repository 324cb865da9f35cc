"""``models report`` on a real archive: it finds the version, its outcomes and its decisions, and writes one file."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

import runner
from bus.store import Store
from commands.output import DONE, NO, WRONG
from tests.models import files, manifest_of

T0 = datetime(2026, 1, 5, tzinfo=UTC)


async def mt5(*words: object) -> int:
    return await asyncio.to_thread(runner.main, [str(word) for word in words])


async def test_it_writes_what_the_archive_knows(
    tmp_path: Path, pg_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MT5_DATABASE_URL", pg_url)
    monkeypatch.setenv("MT5_HOME", str(tmp_path / "home"))
    artifacts = files()
    version = manifest_of(artifacts).version
    store = await Store.connect(pg_url)
    await store.execute("upsert_model", "rf_m1", version, "M1", "candidate", T0, artifacts["manifest.json"].decode())
    await store.execute("set_model_state", "rf_m1", version, "champion", 7, T0, "it won 9,999 times", "scorer")
    await store.close()
    connection = await asyncpg.connect(pg_url)
    outcomes = [
        (f"s{i}", T0 + timedelta(minutes=i), i >= 60, 0.7 if i % 2 else 0.3, bool(i % 2), 0.0001 if i < 60 else 9.0)
        for i in range(80)
    ]
    await connection.executemany(
        "INSERT INTO signal_outcomes (id, ts, void, prob_up, up, net, symbol, timeframe, model_name, model_version, state,"
        " base_rate, label, ret, candles_seq, fwd_seq)"
        f" VALUES ($1, $2, $3, $4, $5, $6, 'EURUSD', 'M1', 'rf_m1', '{version}', 'champion', 0.5, 1, 0.1, 1, 1)",
        outcomes,
    )
    await connection.execute(
        "INSERT INTO model_decisions (at, model_name, version, action, by, reason)"
        " VALUES ($1, 'rf_m1', $2, 'promoted', 'scorer', 'e-value 123.4'), ($1, 'rf_m1', 'other', 'x', 'y', 'not this one')",
        T0,
        version,
    )
    await connection.close()

    assert await mt5("models", "report", version, "--json") == DONE
    said = json.loads(capsys.readouterr().out)
    file = tmp_path / "home" / "reports" / f"rf_m1-{version}.html"
    assert said == {"model_name": "rf_m1", "version": version, "file": str(file)}
    text = file.read_text().replace("\u00a0", " ")
    assert "it won 9,999 times" in text
    assert "e-value 123.4" in text
    assert "not this one" not in text
    assert '<td class="n">60</td>' in text  # outcomes that stand
    assert '<td class="n">0.09000</td><td class="n">0.25000</td>' in text
    assert "+1.00 bp" in text

    assert await mt5("models", "report", version, "--html", "here.html") == DONE
    assert capsys.readouterr().out == f"The report of rf_m1 {version} is in here.html.\n"
    assert (tmp_path / "here.html").read_text().startswith("<!doctype html>")
    assert await mt5("models", "report", version, "--html", "no/where.html") == WRONG
    assert "no/where.html cannot be written (No such file or directory)" in capsys.readouterr().err
    assert await mt5("models", "report", "nothing") == NO
    assert "There is no version nothing: `mt5 models list` shows them." in capsys.readouterr().err
