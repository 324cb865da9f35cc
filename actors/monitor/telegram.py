"""Notices as messages of a Telegram bot: plain text, so that nothing in it is taken for markup."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final

import msgspec
from msgspec import Struct

from actors.core.wording import body, headline
from actors.monitor.calls import call, checked, host_of
from actors.monitor.outbox import SendFailed
from bus.supervise import ConfigurationError
from schema.health import Notice
from schema.settings import Telegram

LENGTH: Final = 4_096  # UTF-16 units of a message, as Telegram counts
_TOKEN: Final = re.compile(r"[0-9]+:[A-Za-z0-9_-]+")


class Parameters(Struct, frozen=True):
    retry_after: float | None = None


class Reply(Struct, frozen=True):
    """What the bot API answers; unknown keys are ignored."""

    ok: bool = False
    description: str = ""
    parameters: Parameters = Parameters()


def message(notice: Notice) -> str:
    """Headline and text in at most :data:`LENGTH` UTF-16 units."""
    text = f"{headline(notice)}\n\n{body(notice)}".rstrip()
    units = text.encode("utf-16-le")
    if len(units) <= 2 * LENGTH:
        return text
    # A pair that the cut has halved is left out.
    return units[: 2 * (LENGTH - 1)].decode("utf-16-le", "ignore") + "…"


class TelegramSender:
    """One ``sendMessage`` for each notice.

    Raises:
        ConfigurationError: token, chat or api are missing or cannot be right.
    """

    name: ClassVar[str] = "telegram"

    def __init__(self, settings: Telegram, log: Any) -> None:
        if settings.token is None or settings.chat is None:
            raise ConfigurationError("[notify.telegram] needs a token and a chat.")
        if not _TOKEN.fullmatch(settings.token):
            raise ConfigurationError("[notify.telegram] token is none: BotFather gives it as 123456:ABC-DEF.")
        api = checked(settings.api, "[notify.telegram] api").rstrip("/")
        self._url = f"{api}/bot{settings.token}/sendMessage"
        self._chat = settings.chat
        self._log = log

    async def send(self, notice: Notice) -> str | None:
        content = {
            "chat_id": self._chat,
            "text": message(notice),
            "link_preview_options": {"is_disabled": True},
            "disable_notification": notice.severity == "info" and notice.kind != "test",
        }
        answer = await call(
            "POST", self._url, body=msgspec.json.encode(content), headers={"Content-Type": "application/json"}
        )
        try:
            reply = msgspec.json.decode(answer.text, type=Reply)
        except msgspec.DecodeError:
            reply = Reply(description=answer.text)
        if answer.ok and reply.ok:
            return None
        host = host_of(self._url)
        raise SendFailed(
            f"Telegram at {host} answered {answer._replace(text=reply.description)}.",
            # 400 is also "chat not found" and "bot was blocked": those a person can mend.
            permanent=answer.status == 400 and "message" in reply.description.lower(),
            retry_after=reply.parameters.retry_after or answer.retry_after,
        )
