"""kill -9 of the monitor around a send: nothing is lost, and what had to be sent again carries the same Message-ID.

A real SMTP server kills the process at the points that the seed has drawn: within the dialogue, after the mail is kept and
before the process can know of it, just after it could, or at any moment. Then the process is started again, until all is told.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from actors.core.mail import message_id
from actors.core.wording import body, headline
from tests.mailbox import Mailbox, mail_server
from tests.outbox_process import database, news
from tests.servers import ROOT

NOTICES = 4
KILLS = 3
SEEDS = 100
CI_SEEDS = 30
SHARE = 10  # of one test
STAGES = ("EHLO", "MAIL", "RCPT", "DATA", "KEPT", "REPLIED", "moment", "queued", "committed")
CERTAIN = set(STAGES) - {"REPLIED", "moment"}  # at those two the process may have ended before the signal comes
LIFE_SECONDS = 30.0


class Zygote:
    """Starts workers, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.outbox_process"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, folder: Path, port: int, crash: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder} {port} {NOTICES} {crash}\n")
        self._process.stdin.flush()
        return int(self._line())

    def ended(self) -> int:
        """The worker's exit status; negative: the signal that ended it."""
        return int(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], LIFE_SECONDS)
        assert ready, "the worker neither ended nor told everything in time"
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with closing(Zygote()) as made:
        yield made


class Killer:
    """Kills the worker when the server has come to the drawn stage the drawn number of times, or at a drawn moment."""

    def __init__(self, box: Mailbox, stage: str, chance: random.Random) -> None:
        self.hit: int | None = None  # how many mails the server had when it killed
        self._box = box
        self._stage = stage
        self._countdown = chance.randrange(1, NOTICES + 1)
        self._delay = chance.uniform(0.0, 0.06)
        self._pid: int | None = None
        self._lock = threading.Lock()
        self.crash = f"{self._stage}-{self._countdown - 1}" if self._stage in ("queued", "committed") else "never"
        box.hook = self._reached

    @property
    def stage(self) -> str:
        return self._stage

    def aim(self, pid: int) -> threading.Timer | None:
        with self._lock:
            self._pid = pid
            if self._countdown == 0:  # it came there before its pid was known
                self._fire()
        if self._stage != "moment":
            return None
        timer = threading.Timer(self._delay, self._fire)
        timer.start()
        return timer

    def _reached(self, stage: str, argument: str) -> None:
        with self._lock:
            if stage == self._stage and self._countdown > 0:
                self._countdown -= 1
                if self._countdown == 0 and self._pid is not None:
                    self._fire()

    def _fire(self) -> None:
        if self.hit is None and self._pid is not None:
            self.hit = len(self._box.received)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


def tell_everything(folder: Path, seed: int, zygote: Zygote) -> Counter[str]:
    """One seed; returns the kills by where they came."""
    chance = random.Random(seed)
    twice: list[int] = []  # indexes of mails that were kept when the process could not know
    kills: Counter[str] = Counter()
    with mail_server() as box:
        for life in range(KILLS + 1):
            killer = Killer(box, STAGES[(seed + 4 * life) % len(STAGES)], chance)
            if life == KILLS:
                box.hook = lambda stage, argument: None
                killer.crash = "never"
            pid = zygote.start(folder, box.port, killer.crash)
            timer = killer.aim(pid) if life < KILLS else None
            status = zygote.ended()
            if timer is not None:
                timer.cancel()
                timer.join()
            assert status in (0, -signal.SIGKILL)
            if status != 0:
                kills[killer.stage] += 1
                if killer.hit is not None and killer.stage in ("DATA", "KEPT"):  # at DATA the server has it all already
                    twice.append(killer.hit - (killer.stage == "KEPT"))
        assert status == 0, "the last life was killed by nobody"

    sent = defaultdict(list)
    for index, received in enumerate(box.received):
        mail = received.mail
        sent[str(mail["Subject"])].append((index, str(mail["Message-ID"]), mail.get_content().replace("\r\n", "\n")))
    expected = news(NOTICES)
    assert [one.kind for one in expected] == ["opened", "closed"] * (NOTICES // 2)
    assert sorted(sent) == sorted(headline(one) for one in expected), "lost, or nobody's"
    for one in expected:
        copies = sent[headline(one)]
        assert {copy[1] for copy in copies} == {message_id(one.id, "example.org")}
        assert {copy[2] for copy in copies} == {body(one)}
    firsts = [sent[headline(one)][0][0] for one in expected]
    assert firsts == sorted(firsts), "out of order"
    assert len(box.received) <= NOTICES + kills.total(), "sent again without need"
    again = {index for copies in sent.values() if len(copies) > 1 for index, *_ in copies}
    assert again.issuperset(twice), "nobody could know that these were taken: they must have come again"
    with closing(database(folder)) as connection:
        rows = connection.execute("SELECT notice, sent_at IS NOT NULL FROM outbox ORDER BY rowid").fetchall()
        incidents = connection.execute(
            "SELECT incident, closed_at IS NOT NULL FROM incidents ORDER BY opened_at"
        ).fetchall()
    assert rows == [(one.id, 1) for one in expected]
    assert incidents == [(one.incident, 1) for one in expected[::2]], "an incident and its notices are one transaction"
    return kills


@pytest.mark.parametrize(
    "first",
    [first if first < CI_SEEDS else pytest.param(first, marks=pytest.mark.torture) for first in range(0, SEEDS, SHARE)],
)
def test_kill_9_around_a_send_loses_nothing_in_a_hundred_seeds(tmp_path: Path, first: int, zygote: Zygote) -> None:
    kills: Counter[str] = Counter()
    for seed in range(first, first + SHARE):
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            kills += tell_everything(folder, seed, zygote)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        shutil.rmtree(folder)
    assert set(kills) >= CERTAIN, f"some points were never hit: {kills}"


@pytest.mark.parametrize("stage", ["RCPT", "KEPT"])
def test_a_mail_is_sent_again_if_nobody_knows_whether_it_was_taken(tmp_path: Path, stage: str, zygote: Zygote) -> None:
    """Killed at the one point at which a copy cannot be avoided, it is one copy; just before it, none."""
    with mail_server() as box:
        killed = threading.Event()
        pids: list[int] = []
        started = threading.Event()

        def hook(at: str, argument: str) -> None:
            if at == stage and not killed.is_set():
                started.wait(5)
                killed.set()
                os.kill(pids[0], signal.SIGKILL)

        box.hook = hook
        pids.append(zygote.start(tmp_path, box.port, "never"))
        started.set()
        assert zygote.ended() == -signal.SIGKILL
        zygote.start(tmp_path, box.port, "never")
        assert zygote.ended() == 0
    ids = [str(one.mail["Message-ID"]) for one in box.received]
    assert len(set(ids)) == NOTICES
    assert len(ids) == NOTICES + (stage == "KEPT")
    assert ids[0] == message_id(news(1)[0].id, "example.org")
    assert (ids[1] == ids[0]) == (stage == "KEPT")
