"""Notices as JSON to a URL, signed where there is a secret. Slack and Mattermost show its ``text`` as it is."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, ClassVar, Final

import msgspec

from actors.core.mail import token
from actors.core.wording import body, headline
from actors.monitor.calls import Answer, call, checked, host_of
from actors.monitor.outbox import SendFailed
from bus.supervise import ConfigurationError
from schema.health import Notice
from schema.settings import Webhook

SIGNATURE: Final = "X-MT5-Signature"
# What says that this body is not wanted; everything else may change by itself or by a person's hand.
REFUSALS: Final = frozenset({400, 406, 413, 415, 422})


def payload(notice: Notice) -> bytes:
    """The notice's fields and ``text``; a report's HTML and pictures stay out: they are the mail's."""
    plain = msgspec.structs.replace(notice, html="", pictures={})
    fields = {name: value for name, value in msgspec.to_builtins(plain).items() if name not in ("html", "pictures")}
    return msgspec.json.encode({**fields, "text": f"{headline(notice)}\n{body(notice)}"})


def signature(secret: str, content: bytes) -> str:
    """The hexadecimal HMAC-SHA256 of the body."""
    return hmac.new(secret.encode(), content, hashlib.sha256).hexdigest()


class WebhookSender:
    """One POST for each notice; any 2xx means that it was taken.

    Raises:
        ConfigurationError: there is no URL that can be called.
    """

    name: ClassVar[str] = "webhook"

    def __init__(self, settings: Webhook, log: Any) -> None:
        if settings.url is None:
            raise ConfigurationError("[notify.webhook] needs a url.")
        self._url = checked(settings.url, "[notify.webhook] url")
        self._secret = settings.secret
        self._log = log

    async def send(self, notice: Notice) -> str | None:
        content = payload(notice)
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": token(notice.id),  # the same for what is sent again
        }
        if self._secret:
            headers[SIGNATURE] = signature(self._secret, content)
        answer = await call("POST", self._url, body=content, headers=headers)
        if not answer.ok:
            raise _refused(answer, host_of(self._url))
        return None


def _refused(answer: Answer, host: str) -> SendFailed:
    return SendFailed(
        f"The webhook at {host} answered {answer}.",
        permanent=answer.status in REFUSALS,
        retry_after=answer.retry_after,
    )
