"""Between the actors and their servers lies a network that delays, cuts, resets and swallows."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from tests.servers import OPERATOR, nats_server, postgres_server
from tests.torture.proxy import Proxy
from tests.torture.rig import PROGRESS_SECONDS, Rig

STEPS = 40
SWALLOWED_SECONDS = (1.0, 25.0)


def through(url: str, proxy: Proxy) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}"))


@pytest.mark.torture
@pytest.mark.timeout(1_800)
def test_a_bad_network_costs_time_and_nothing_else(tmp_path: Path, torture_seed: int) -> None:
    with (
        nats_server(tmp_path / "nats") as nats,
        postgres_server(tmp_path / "postgres") as postgres,
        Proxy(nats.port) as to_nats,
        Proxy(postgres.port) as to_postgres,
    ):
        urls = nats.url(OPERATOR), postgres.url
        rig = Rig(
            tmp_path / "rig",
            torture_seed,
            "a bad network",
            given=urls,
            MT5_NATS_URL=through(urls[0], to_nats),
            MT5_DATABASE_URL=through(urls[1], to_postgres),
        )
        with rig.running():
            for _ in range(STEPS):
                proxy = rig.rng.choice((to_nats, to_nats, to_postgres))
                match rig.rng.choice(("delay", "cut", "reset", "swallow")):
                    case "delay":
                        proxy.delay = rig.rng.uniform(0.005, 0.2)
                        rig.tally.done["delayed"] += 1
                        time.sleep(rig.rng.uniform(1, 4))
                        proxy.delay = 0.0
                    case "cut":
                        rig.tally.done["connections cut"] += proxy.cut()
                    case "reset":
                        rig.tally.done["connections reset"] += proxy.reset()
                    case "swallow":
                        proxy.swallow()
                        rig.tally.done["swallowed"] += 1
                        time.sleep(rig.rng.uniform(*SWALLOWED_SECONDS))
                        proxy.flow()
                rig.feed.await_progress(rig.rng.randint(20, 100), PROGRESS_SECONDS)
            rig.assert_clean()
