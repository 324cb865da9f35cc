"""``install-systemd``: the units and timers of deploy/systemd, with this installation's paths and account in them.

In the system's own folder it also makes the account and the folders, as root; into any other ``--dir`` it only writes
the files, for a look or for a package. It enables nothing: what to do next is printed.
"""

from __future__ import annotations

import argparse
import functools
import grp
import os
import pwd
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from commands.output import DONE, NO, WRONG, CommandError, say, write_json
from deploy.process import Account

SYSTEM_DIR: Final = Path("/etc/systemd/system")
CONFIG_DIR: Final = Path("/etc/mt5")
DEFAULT_HOME: Final = "/var/lib/mt5"
ROOT: Final = Path(__file__).resolve().parents[1]
MARK: Final = "# Made by `mt5 install-systemd`, which writes it anew: change it with `systemctl edit`."

WHOLE: Final = ("mt5.service",)
PER_ACTOR: Final = ("mt5.target", "mt5-setup.service", "mt5@.service")
OF_CHECKOUT: Final = ("mt5-tests", "mt5-update", "mt5-update@")  # an installed package has neither tests nor revisions
UNIT: Final = re.compile(r".*\.(service|timer|path|target)")

# What the files in deploy/systemd say, and units must say of this machine.
_PROGRAM: Final = "/opt/mt5/.venv/bin/python /opt/mt5/runner.py"
_CHECKOUT: Final = "/opt/mt5"
_PLACES: Final = re.compile(
    rf"{re.escape(_PROGRAM)}|{_CHECKOUT}\b|{DEFAULT_HOME}\b|(?<=^User=)mt5$|(?<=^Group=)mt5$|(?<=try-restart )mt5\.service$",
    re.MULTILINE,
)

_PLAIN_PATH: Final = re.compile(r"/[A-Za-z0-9/._+@=-]*")  # what a unit takes without quotes or escapes
_PLAIN_NAME: Final = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
NOT_OURS: Final = ("root", "nobody")
HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - behind ProtectHome and PrivateTmp

ACCOUNT: Final = 'u {user} - "MT5 trading system" {home} /usr/sbin/nologin\n'  # sysusers.d(5)
FOLDERS: Final = (  # tmpfiles.d(5): what exists keeps its contents
    "d {home} 0700 {user} {group}\n"
    "d {home}/run 0700 {user} {group}\n"
    "d {config} 0750 root {group}\n"
    "f {config}/mt5.toml 0640 root {group} - # `mt5 settings` lists every setting and what is in force.\\n\n"
    "f {config}/mt5.env 0600 root root - # Secrets of every unit, such as MT5_NOTIFY_SMTP_PASSWORD=…\\n\n"
)


@dataclass(frozen=True, slots=True)
class Site:
    """Where this installation is and as whom it runs."""

    program: tuple[str, ...]
    root: Path
    home: Path
    user: str
    group: str
    per_actor: bool

    @property
    def main(self) -> str:
        return "mt5.target" if self.per_actor else "mt5.service"


def install(args: argparse.Namespace) -> int:
    """``install-systemd [--dir DIR] [--user NAME] [--home DIR] [--per-actor] [--remove] [--json]``."""
    folder = Path(args.dir).absolute()
    system = folder == SYSTEM_DIR
    if system:
        _need_root_and_systemd()
    if args.remove:
        return _remove(folder, system, as_json=args.json)
    site = _site(args.user, Path(args.home or DEFAULT_HOME).absolute(), per_actor=args.per_actor)
    if hidden := _hidden(site):
        sentence = f"Units do not see {hidden} (ProtectHome, PrivateTmp): put it elsewhere, such as {_CHECKOUT}."
        if system:
            raise CommandError(sentence, NO)
    _check_other_shape(folder, site)
    if system:
        _make_account(site)
        site = _site(site.user, site.home, per_actor=site.per_actor)  # with the account's own group
        _make_folders(site)
        _check_runs(site)
    units = dict(rendered(site))
    obsolete = [path.name for path in _ours(folder) if path.name not in units]
    if system:
        _disable(obsolete)
    for name in obsolete:
        (folder / name).unlink()
    written = _write(folder, units)
    if system and (written or obsolete) and _running():
        _run("systemctl", "daemon-reload")
    steps = [f"# {sentence}"] if hidden else []
    steps += _next(site, folder, written) if system else [f"systemd-analyze verify {folder}/*.service {folder}/*.timer"]
    if args.json:
        write_json({"dir": str(folder), "units": sorted(units), "written": written, "removed": obsolete, "next": steps})
        return DONE
    say(f"{folder}: {len(units)} units, {len(written)} of them new or changed.")
    say("Next:")
    for step in steps:
        say(f"  {step}")
    return DONE


def rendered(site: Site) -> Iterator[tuple[str, str]]:
    """Each file's name with its text for this installation."""
    left_out = WHOLE if site.per_actor else PER_ACTOR
    for source in sorted(files("deploy").joinpath("systemd").iterdir(), key=lambda file: file.name):
        if not UNIT.fullmatch(source.name) or source.name in left_out:
            continue
        if source.name.rpartition(".")[0] in OF_CHECKOUT and not (site.root / "runner.py").is_file():
            continue
        text = _PLACES.sub(functools.partial(_place, site), source.read_text(encoding="utf-8"))
        yield source.name, f"{MARK}\n{text}"


def _place(site: Site, found: re.Match[str]) -> str:
    word = found.group()
    if word == "mt5":
        return site.user if found.string[: found.start()].endswith("User=") else site.group
    return {
        _PROGRAM: " ".join(site.program),
        _CHECKOUT: str(site.root),
        DEFAULT_HOME: str(site.home),
        # Not the target: it is active only once the last of them has started, and until then no restart would reach any.
        "mt5.service": "mt5@*.service" if site.per_actor else "mt5.service",
    }[word]


def _site(user: str, home: Path, *, per_actor: bool) -> Site:
    if not _PLAIN_NAME.fullmatch(user) or user in NOT_OURS:
        raise CommandError(f'"{user}" cannot be the account: give --user a plain name that nobody else has.', WRONG)
    try:
        group = grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name
    except KeyError:
        group = user  # as it will be made
    packaged = ROOT in map(Path, sysconfig.get_paths().values())
    program = (sys.executable, "-P", "-m", "runner") if packaged else (sys.executable, str(ROOT / "runner.py"))
    root = Path(sys.prefix) if packaged else ROOT
    for path in (sys.executable, str(root), str(home)):
        if not _PLAIN_PATH.fullmatch(path):
            raise CommandError(f"{path} has characters that units would have to escape: move it to a plain path.", NO)
    return Site(program, root, home, user, group, per_actor)


def _hidden(site: Site) -> str | None:
    """A path of the installation that the units' sandbox hides."""
    paths = [*site.program, str(site.root), str(site.home), os.path.realpath(sys.executable), sys.base_prefix]
    for path in filter(os.path.isabs, paths):
        if any(Path(path).is_relative_to(place) for place in HIDDEN):
            return path
    return None


# --- the machine -------------------------------------------------------------------------------------------------


def _need_root_and_systemd() -> None:
    if os.geteuid() != 0:
        raise CommandError(f"Only root may write {SYSTEM_DIR}: run this with sudo, or give --dir.", WRONG)
    for program in ("systemctl", "systemd-sysusers", "systemd-tmpfiles"):
        if shutil.which(program) is None:
            raise CommandError(f"This machine has no {program}: give --dir to write the units elsewhere.", NO)


def _make_account(site: Site) -> None:
    _run("systemd-sysusers", "-", stdin=ACCOUNT.format(user=site.user, home=site.home))


def _make_folders(site: Site) -> None:
    text = FOLDERS.format(home=site.home, config=CONFIG_DIR, user=site.user, group=site.group)
    _run("systemd-tmpfiles", "--create", "-", stdin=text)


def _check_runs(site: Site) -> None:
    """The account must be able to run the program: a checkout or a Python behind a closed folder is told now."""
    account = _account(site.user)
    try:
        answer = subprocess.run(
            [*site.program, "--help"],
            cwd="/",
            env={"PATH": os.defpath},
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        words = error.strerror or str(error)
    else:
        if answer.returncode == 0:
            return
        words = (answer.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise CommandError(
        f"{site.user} cannot run {' '.join(site.program)} ({words}): put the checkout where it can, such as {_CHECKOUT}.",
        NO,
    )


def _account(user: str) -> Account:
    entry = pwd.getpwnam(user)
    return Account(entry.pw_uid, entry.pw_gid)


def _check_other_shape(folder: Path, site: Site) -> None:
    """The whole and a unit per actor are two shapes of one system: both at once would fight."""
    other = WHOLE[0] if site.per_actor else PER_ACTOR[0]
    if (folder / other).exists():
        raise CommandError(
            f"{folder / other} is the other shape of the same system: take it away first, with --remove.", NO
        )


def _running() -> bool:
    return Path("/run/systemd/system").is_dir()


def _run(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CommandError(
            f"{argv[0]} failed: {' | '.join(done.stderr.split(chr(10))).strip(' |') or 'no reason'}.", NO
        )
    return done.stdout


# --- the files ---------------------------------------------------------------------------------------------------


def _ours(folder: Path) -> list[Path]:
    """The units in a folder that this command has written."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if UNIT.fullmatch(path.name) and _is_ours(path))


def _is_ours(path: Path) -> bool:
    if not path.is_file() or path.is_symlink():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n") == MARK


def _write(folder: Path, units: dict[str, str]) -> list[str]:
    """Writes what differs, each file whole or not at all; returns the names."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in units:
            if (folder / name).exists() and not _is_ours(folder / name):
                raise CommandError(f"{folder / name} is not one of ours: move it away first.", NO)
        changed = [name for name, text in units.items() if not _holds(folder / name, text)]
        for name in changed:
            draft = folder / f".{name}.{os.getpid()}"
            draft.write_text(units[name], encoding="utf-8")
            draft.chmod(0o644)
            draft.replace(folder / name)
    except OSError as error:
        raise CommandError(f"{error.filename or folder} cannot be written: {error.strerror}.", NO) from error
    return changed


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8", errors="replace") == text


def _remove(folder: Path, system: bool, *, as_json: bool) -> int:
    names = [path.name for path in _ours(folder)]
    if system:
        _disable(names)
    try:
        for name in names:
            (folder / name).unlink()
    except OSError as error:
        raise CommandError(f"{error.filename or folder} cannot be removed: {error.strerror}.", NO) from error
    if system and names and _running():
        _run("systemctl", "daemon-reload")
    if as_json:
        write_json({"dir": str(folder), "units": [], "written": [], "removed": names, "next": []})
    else:
        say(f"{folder}: {len(names)} units removed; the account, its state and {CONFIG_DIR} stay.")
    return DONE


def _disable(names: Sequence[str]) -> None:
    """Stops what is going away, a template's instances too, and takes it out of the boot."""
    plain = [name for name in names if "@" not in name]
    instances = [name.replace("@.", "@*.") for name in names if "@" in name]
    if instances and _running():
        _run("systemctl", "stop", *instances)
    if plain:
        _run("systemctl", "disable", *(["--now"] if _running() else []), *plain)


# --- words -------------------------------------------------------------------------------------------------------


def _next(site: Site, folder: Path, written: Sequence[str]) -> list[str]:
    steps = []
    account = _account(site.user)
    for path, why in ((site.root, "mt5-update writes it"), (site.home, "all state")):
        if path.stat().st_uid != account.uid or _strangers(path, account.uid):
            steps.append(f"chown --recursive {site.user}: {path}  # {why}")
    secrets = f"{CONFIG_DIR}/mt5.env" + (f" and {CONFIG_DIR}/ACTOR.env" if site.per_actor else "")
    steps.append(f"$EDITOR {CONFIG_DIR}/mt5.toml  # settings; secrets into {secrets}")
    timers = sorted(path.name for path in _ours(folder) if path.suffix == ".timer")
    steps.append(f"systemctl enable --now {site.main} mt5-restart.path")
    steps.append(f"systemctl enable --now {' '.join(timers)}")
    if written and _running():
        steps.append(f"systemctl try-restart {site.main}  # where it runs already: its unit has changed")
    steps.append(f"systemctl status {site.main}; journalctl --unit {site.main} --follow")
    return steps


def _strangers(folder: Path, uid: int) -> bool:
    """Whether anything right below belongs to somebody else."""
    return any(path.lstat().st_uid != uid for path in folder.iterdir())
