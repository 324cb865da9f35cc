"""The checkout that this runs from, as `git` shows and moves it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from commands.jobs_programs import JobFailed, Ran, run

GIT_SECONDS: Final = 60.0
FETCH_SECONDS: Final = 300.0
REMOTE: Final = "origin"
SUBJECTS: Final = 20  # of the commits that an update brings, in its mail

# What a hook or a caller's own git would have us work on instead.
_FOREIGN: Final = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"})
_NOTHING: Final[Mapping[str, str]] = {}


class Position(Struct, frozen=True):
    """Where a checkout stands; ``branch`` None: on a revision and no branch."""

    revision: str
    branch: str | None


class Checkout:
    """A git work tree. Its files are code that this user runs anyway, so whose they are does not matter to git either."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._git(("rev-parse", "--show-toplevel"), "is no git checkout")

    # --- looking -------------------------------------------------------------------------------------------------

    def position(self) -> Position:
        revision = self._git(("rev-parse", "--verify", "HEAD^{commit}"), "has no commit")
        branch = self._ask("symbolic-ref", "--quiet", "--short", "HEAD")
        return Position(revision, branch.out.strip() if branch.code == 0 else None)

    def refuse_changes(self) -> None:
        """Raises JobFailed where someone has changed what git keeps: an update would have to throw that away."""
        changed = self._git(("status", "--porcelain", "--untracked-files=no"), "cannot be looked at")
        if changed:
            raise JobFailed(
                f"{self.path} has changes of its own: commit them to a branch, or take them back with `git stash`.",
                changed.splitlines()[:SUBJECTS],
            )

    def fetch(self) -> None:
        """Raises JobFailed where the remote does not answer."""
        ran = self._ask("fetch", "--quiet", "--prune", REMOTE, seconds=FETCH_SECONDS)
        if ran.code != 0:
            raise JobFailed(
                f"{REMOTE} could not be fetched: is the network up, and the deploy key in place?", ran.tail()
            )

    def target(self, wanted: str | None) -> str:
        """The revision to go to: that which is asked for, else the newest of the branch as the remote has it."""
        if wanted is None:
            names = ["@{upstream}", f"refs/remotes/{REMOTE}/HEAD"]
        else:
            names = [f"refs/remotes/{REMOTE}/{wanted}", wanted]
        for name in names:
            found = self._ask("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
            if found.code == 0:
                return found.out.strip()
        if wanted is None:
            raise JobFailed(
                f"{self.path} follows no branch of {REMOTE}: check one out, as in `git checkout main`, or give --to."
            )
        raise JobFailed(f'There is no revision "{wanted}" in {self.path} or at {REMOTE}.')

    def has(self, older: str, newer: str) -> bool:
        """Whether one revision is part of another's history."""
        return self._ask("merge-base", "--is-ancestor", older, newer).code == 0

    def changed(self, old: str, new: str, *paths: str) -> bool:
        return self._ask("diff", "--quiet", old, new, "--", *paths).code != 0

    def subjects(self, old: str, new: str) -> list[str]:
        """The commits that lie between, newest first; a bounded number."""
        words = ("log", f"--max-count={SUBJECTS}", "--format=%h %s", f"{old}..{new}")
        return self._git(words, "has no history").splitlines()

    def copy(self, revision: str, folder: Path) -> None:
        """Writes a revision's files into an empty folder; nothing else of the checkout gets there, nor changes."""
        index = folder.with_name(f"{folder.name}.index")  # of this copy, beside the checkout's own
        try:
            for words in (("read-tree", revision), ("checkout-index", "--all", f"--prefix={folder}/")):
                self._git(words, "cannot be copied", env={"GIT_INDEX_FILE": str(index)})
        finally:
            index.unlink(missing_ok=True)

    # --- moving --------------------------------------------------------------------------------------------------

    def go(self, here: Position, revision: str, *, asked: bool) -> None:
        """Moves to a revision, on the branch where it lies ahead of it.

        Only one that was asked for by name may lie elsewhere: a remote whose history was rewritten is nothing to follow
        at night.
        """
        if self.has(here.revision, revision):
            if here.branch:
                self._git(("merge", "--quiet", "--ff-only", revision), "could not be moved forward")
                return
        elif not asked:
            raise JobFailed(
                f"{REMOTE} does not go on from {short(here.revision)}, where {self.path} stands: its history was rewritten, or "
                f"commits were made here. Look at it, then name the revision: `mt5 job update --to {short(revision)}`."
            )
        self._git(("checkout", "--quiet", "--detach", revision), "could not be moved")

    def back(self, to: Position) -> None:
        """Puts the checkout where it was, also in the middle of a move."""
        self._git(("reset", "--quiet", "--hard"), "could not be put back")
        if to.branch:
            self._git(("checkout", "--quiet", to.branch), "could not be put back")
            self._git(("reset", "--quiet", "--hard", to.revision), "could not be put back")
        else:
            self._git(("checkout", "--quiet", "--detach", to.revision), "could not be put back")

    def _ask(self, *words: str, seconds: float = GIT_SECONDS, env: Mapping[str, str] = _NOTHING) -> Ran:
        whole = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        whole |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **env}
        whole.setdefault("GIT_SSH_COMMAND", "ssh -o BatchMode=yes -o ConnectTimeout=20")
        options = ("-c", f"safe.directory={self.path}", "-c", f"core.hooksPath={os.devnull}")
        return run(("git", *options, *words), cwd=self.path, seconds=seconds, env=whole)

    def _git(self, words: tuple[str, ...], trouble: str, env: Mapping[str, str] = _NOTHING) -> str:
        ran = self._ask(*words, env=env)
        if ran.code != 0:
            raise JobFailed(f"{self.path} {trouble}.", ran.tail())
        return ran.out.strip()


def short(revision: str) -> str:
    return revision[:12]
