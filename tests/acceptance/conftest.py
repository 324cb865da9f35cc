"""Whole systems for the acceptance tests: each `mt5 up` is a real process with a home of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.mailbox import Mailbox, mail_server
from tests.system import System

Make = Callable[..., System]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Makes systems that are not started yet; at the module's end each is stopped and its logs are looked through."""
    made: list[System] = []

    def new(*actors: str, **settings: str) -> System:
        made.append(System(tmp_path_factory.mktemp("system"), settings, actors))
        return made[-1]

    yield new
    refused = []
    for system in made:
        system.end()
        # Every actor works under its own NATS user: a right that it lacks shows in its log, whatever else went well.
        refused += [line for line in system.logs().splitlines() if "permissions violation" in line.lower()]
        for folder in ("nats", "postgres"):
            shutil.rmtree(system.home / folder, ignore_errors=True)
    assert not refused


@pytest.fixture(scope="module")
def mailbox() -> Iterator[Mailbox]:
    with mail_server() as box:
        yield box


def mailing(mailbox: Mailbox) -> dict[str, str]:
    """Settings with which the owner's mails go there."""
    return {
        "MT5_NOTIFY_SMTP_HOST": "127.0.0.1",
        "MT5_NOTIFY_SMTP_PORT": str(mailbox.port),
        "MT5_NOTIFY_SMTP_SECURITY": "none",
        "MT5_NOTIFY_SMTP_RECIPIENTS": "owner@example.org",
    }


@pytest.fixture(scope="module")
def system(make: Make) -> System:
    """One running system that the module's tests share."""
    shared = make()
    shared.start()
    return shared
