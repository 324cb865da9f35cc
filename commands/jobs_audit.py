"""``job vuln-check``: known holes in what the locks install, by pip-audit, and npm audit where a package-lock.json is.

One question covers all: requirements/test.lock holds every package of the others. A hole in what serves is critical, one
in a library of the tests a warning. What cannot be mended yet is accepted by name, with a reason, in
requirements/accepted-vulnerabilities.txt, and mentioned. Without a network the answer is that nobody knows, which is no.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from commands.jobs import Job, Outcome
from commands.jobs_programs import JobFailed, last_lines, run

SECONDS: Final = 900.0
WHOLE: Final = "requirements/test.lock"
SERVING: Final = ("requirements/runtime.lock", "requirements/embedded.lock")
ACCEPTED: Final = "requirements/accepted-vulnerabilities.txt"
LINE: Final = 160

_PIN: Final = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==", re.MULTILINE)


class Hole(NamedTuple):
    """A known vulnerability of one installed package."""

    package: str
    version: str
    names: tuple[str, ...]  # its id and other ids of the same
    mended: tuple[str, ...]  # versions
    serves: bool  # the package is installed where signals are made
    text: str = ""

    def line(self) -> str:
        where = "" if self.serves else " (tests only)"
        mend = f"mended in {', '.join(self.mended)}" if self.mended else "no version mends it yet"
        return f"{self.package} {self.version}{where}: {self.names[0]}, {mend}. {self.text}"[:LINE].rstrip()


def audit(job: Job, checkout: Path) -> Outcome:
    """Raises JobFailed where the question could not be asked."""
    holes = [*_python(job, checkout), *_npm(checkout)]
    accepted = _accepted(checkout / ACCEPTED)
    open_holes = sorted(
        (hole for hole in holes if not accepted.keys() & set(hole.names)), key=lambda hole: not hole.serves
    )
    waived = [hole for hole in holes if accepted.keys() & set(hole.names)]
    details = [hole.line() for hole in open_holes]
    for hole in waived:
        reason = next(accepted[name] for name in hole.names if name in accepted)
        details.append(f"accepted: {hole.package} {hole.version}: {hole.names[0]} ({reason})")
    if not open_holes:
        also = f"; {len(waived)} accepted" if waived else ""
        return Outcome(True, f"No known hole in the dependencies{also}.", tuple(details))
    serving = sum(hole.serves for hole in open_holes)
    details.append(
        "`make lock ARGS=--upgrade` takes newer versions; see that `make test` passes, and commit the locks."
    )
    return Outcome(
        False,
        f"{_count(serving, 'known hole')} in what serves, {len(open_holes) - serving} in what only tests use.",
        tuple(details),
        severity="critical" if serving else "warning",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _python(job: Job, checkout: Path) -> Iterator[Hole]:
    lock = checkout / WHOLE
    if not lock.is_file():
        raise JobFailed(f"{lock} is not there: this is not a checkout, or run `make lock`.")
    words = [*_pip_audit(job), "--requirement", str(lock), "--require-hashes", "--disable-pip", "--no-deps"]
    words += ["--format=json", "--progress-spinner=off", "--desc=on", "--aliases=on"]
    ran = run(words, cwd=checkout, seconds=SECONDS, env={**os.environ, "PIP_NO_INPUT": "1"})
    try:
        # It ends with 1 for a hole, and for a question that nobody answered: only the first comes with a report.
        report = msgspec.json.decode(ran.out, type=_Report)
    except msgspec.DecodeError:
        raise JobFailed(
            f"Nobody knows about holes: pip-audit got no answer (exit code {ran.code}); is the network up?",
            last_lines(ran.err or ran.out),
        ) from None
    serving = {_canonical(name) for place in SERVING for name in _pins(checkout / place)}
    for package in report.dependencies:
        for found in package.vulns:
            yield Hole(
                package.name,
                package.version or "",
                (found.id, *found.aliases),
                tuple(found.fix_versions),
                _canonical(package.name) in serving,
                " ".join(found.description.split()),
            )


def _pip_audit(job: Job) -> list[str]:
    """pip-audit as an installation of the tests' extras has it: here, in `job tests`' environment, or on the PATH."""
    from commands.jobs_tests import tools

    for folder in (Path(sys.prefix), tools(job)):
        if (folder / "bin" / "pip-audit").is_file():
            return [str(folder / "bin" / "python"), "-m", "pip_audit"]
    found = shutil.which("pip-audit")
    if found is None:
        raise JobFailed("pip-audit is not installed: let `mt5 job tests` run once, or `pipx install pip-audit`.")
    return [found]


def _npm(checkout: Path) -> Iterator[Hole]:
    """Every package-lock.json of the checkout; there is none as long as the page needs no build."""
    for lock in sorted(checkout.glob("**/package-lock.json")):
        if "node_modules" in lock.parts or any(part.startswith(".") for part in lock.relative_to(checkout).parts):
            continue
        if shutil.which("npm") is None:
            raise JobFailed(f"{lock} cannot be checked: npm is not installed.")
        ran = run(("npm", "audit", "--json", "--package-lock-only"), cwd=lock.parent, seconds=SECONDS)
        try:
            report = msgspec.json.decode(ran.out, type=_NpmReport)
        except msgspec.DecodeError:
            raise JobFailed(
                f"Nobody knows about holes in {lock}: npm audit got no answer (exit code {ran.code}).",
                last_lines(ran.err or ran.out),
            ) from None
        for name, found in report.vulnerabilities.items():
            yield Hole(name, found.range, (f"npm:{name}",), (), True, found.severity)


def _pins(lock: Path) -> list[str]:
    return _PIN.findall(lock.read_text("utf-8")) if lock.is_file() else []


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _accepted(file: Path) -> dict[str, str]:
    """Names of holes with the reason why each may stay: lines such as ``GHSA-… the function is never called``."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        name, _, reason = line.strip().partition(" ")
        if not name or name.startswith("#"):
            continue
        if not reason.strip():
            raise JobFailed(f"{file} accepts {name} without a reason: write one behind it.")
        found[name] = reason.strip()
    return found


class _Vulnerability(msgspec.Struct):
    id: str
    fix_versions: Sequence[str] = ()
    aliases: Sequence[str] = ()
    description: str = ""


class _Package(msgspec.Struct):
    name: str
    version: str | None = None  # None: skipped
    vulns: Sequence[_Vulnerability] = ()


class _Report(msgspec.Struct):
    dependencies: Sequence[_Package]


class _NpmVulnerability(msgspec.Struct):
    severity: str = ""
    range: str = ""


class _NpmReport(msgspec.Struct):
    vulnerabilities: dict[str, _NpmVulnerability]
