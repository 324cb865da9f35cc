"""The dead man's switch: somebody outside hears from us while all is well, and minds when he does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog

from actors.monitor.calls import call, checked, host_of
from actors.monitor.outbox import SendFailed
from schema.settings import Notify

PING_SECONDS: Final = 10.0  # of one ping


async def ping(settings: Notify, healthy: Callable[[], bool], log: Any = None) -> None:
    """Asks ``ping_url`` by GET every ``ping_seconds`` while ``healthy``, for ever; without a URL it only waits.

    It is silence that raises the alarm there: a ping that fails is logged, once, and nothing more.

    Raises:
        ConfigurationError: ``ping_url`` is no URL.
    """
    if settings.ping_url is None:
        await asyncio.Event().wait()
        return
    log = log or structlog.get_logger(__name__)
    url = checked(settings.ping_url, "[notify] ping_url")
    silent: str | None = None  # why nobody hears us now
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        why = await _once(url) if healthy() else "The monitor does not work as it should, or its mail does not leave."
        if why != silent:
            if why is None:
                log.info("the dead man's switch hears us again", action="ping.back")
            else:
                log.warning("the dead man's switch does not hear us", action="ping.silent", error=why)
            silent = why
        await asyncio.sleep(max(0.0, began + settings.ping_seconds - loop.time()))


async def _once(url: str) -> str | None:
    """Why it was not heard; None when it was."""
    try:
        answer = await call("GET", url, seconds=PING_SECONDS)
    except SendFailed as error:
        return str(error)
    return None if answer.ok else f"{host_of(url)} answered {answer}."
