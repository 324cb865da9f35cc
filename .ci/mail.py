"""Mails what became of a commit: called by the workflows, with everything in the environment and nothing but Python.

MAIL_HOST and the other MAIL_ variables come from the repository's secrets; without them (as in a fork) nobody is told. Port 465
is TLS from the start, any other is STARTTLS: without either nothing is sent. What others have written (a commit's message, a
branch's name) can add no header: a header holds one line here, and a library that refuses two.
"""

from __future__ import annotations

import json
import os
import smtplib
import ssl
import sys
from email.message import EmailMessage
from email.policy import SMTP
from typing import Final

SECONDS: Final = 60.0
SUBJECT: Final = 150  # characters
MESSAGE: Final = 4_000
GOOD: Final = frozenset({"success", "skipped"})


def one_line(text: str, length: int = SUBJECT) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def compose(env: dict[str, str]) -> EmailMessage:
    """The mail of a run; ``env`` as GitHub and the workflow set it."""
    results = {name: job["result"] for name, job in json.loads(env["RESULTS"]).items()}
    failed = [name for name, result in results.items() if result not in GOOD]
    verdict = f"failed in {', '.join(failed)}" if failed else "passed"
    message = env.get("COMMIT_MESSAGE", "").strip()
    first = message.splitlines()[0] if message else env["GITHUB_EVENT_NAME"]
    sha, ref = env["GITHUB_SHA"], env["GITHUB_REF_NAME"]
    place = f"{env['GITHUB_SERVER_URL']}/{env['GITHUB_REPOSITORY']}"
    lines = [
        f"{env['GITHUB_WORKFLOW']} {verdict}: {ref} at {sha[:12]}, pushed by {env['GITHUB_ACTOR']}.",
        "",
        *(f"{name:<10} {result}" for name, result in results.items()),
        "",
        f"{place}/actions/runs/{env['GITHUB_RUN_ID']}",
        f"{place}/commit/{sha}",
        "",
        message[:MESSAGE],
    ]
    mail = EmailMessage(SMTP)
    mail["Subject"] = one_line(f"[MT5] {env['GITHUB_WORKFLOW']} {verdict}: {ref} {sha[:7]} {first}")
    mail["From"] = one_line(env.get("MAIL_FROM") or env["MAIL_TO"].split(",")[0], 300)
    mail["To"] = one_line(env["MAIL_TO"], 1_000)
    mail["Message-ID"] = f"<run-{env['GITHUB_RUN_ID']}-{env['GITHUB_RUN_ATTEMPT']}@github.invalid>"
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content("\n".join(lines).rstrip() + "\n")
    return mail


def send(mail: EmailMessage, env: dict[str, str]) -> None:
    host, port = env["MAIL_HOST"], int(env.get("MAIL_PORT") or 587)
    context = ssl.create_default_context()
    if port == 465 or env.get("MAIL_SECURITY") == "tls":
        server: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=SECONDS, context=context)
    else:
        server = smtplib.SMTP(host, port, timeout=SECONDS)
    with server:
        if not isinstance(server, smtplib.SMTP_SSL):
            server.starttls(context=context)
        if env.get("MAIL_USER"):
            server.login(env["MAIL_USER"], env.get("MAIL_PASSWORD", ""))
        server.send_message(mail)


def main() -> int:
    env = dict(os.environ)
    if not env.get("MAIL_HOST") or not env.get("MAIL_TO"):
        print("::notice::Nobody is told: the secrets MAIL_HOST and MAIL_TO are not set.")
        return 0
    mail = compose(env)
    try:
        send(mail, env)
    except (OSError, smtplib.SMTPException) as error:
        print(f"::error::The mail was not sent: {one_line(str(error))}")
        return 1
    print(mail["Subject"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
