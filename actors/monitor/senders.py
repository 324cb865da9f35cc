"""The ways to a person that the settings name."""

from __future__ import annotations

from typing import Any

from actors.monitor.outbox import Sender
from actors.monitor.smtp import SmtpSender
from actors.monitor.telegram import TelegramSender
from actors.monitor.webhook import WebhookSender
from schema.settings import Notify


def senders(settings: Notify, log: Any) -> dict[str, Sender]:
    """Every configured sender by its name; none where nothing is configured.

    Raises:
        ConfigurationError: one is configured by half, or in a way that cannot work.
    """
    found: list[Sender] = []
    if settings.smtp.host is not None:
        found.append(SmtpSender(settings.smtp, log))
    if settings.webhook.url is not None:
        found.append(WebhookSender(settings.webhook, log))
    if settings.telegram.token is not None or settings.telegram.chat is not None:
        found.append(TelegramSender(settings.telegram, log))
    return {sender.name: sender for sender in found}
