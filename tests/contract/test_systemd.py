"""The units of deploy/systemd as systemd itself judges them, and what `install-systemd` makes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import pytest

import runner
from commands import systemd
from commands.output import CommandError
from commands.up import ACTORS
from tests.conftest import missing
from tests.servers import ordinary_user, python

ROOT: Final = Path(__file__).parents[2]
SOURCE: Final = ROOT / "deploy" / "systemd"
SERVICES: Final = sorted(path.name for path in SOURCE.glob("*.service"))
TIMERS: Final = sorted(path.name for path in SOURCE.glob("*.timer"))
JOBS: Final = {
    "update": "mt5-update",
    "tests": "mt5-tests",
    "vuln-check": "mt5-vuln-check",
    "remote-backup": "mt5-remote-backup",
    "daily-report": "mt5-daily-report",
    "runner-check": "github-runner-check",
}
MOST_EXPOSED: Final = 2.0

Unit = dict[str, list[str]]


def read(path: Path) -> Unit:
    """``Section.Key`` → its values, in order."""
    found: Unit = defaultdict(list)
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[f"{section}.{key}"].append(value)
    return found


def analyze(*words: object) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        missing("systemd-analyze is not installed: apt-get install systemd")
    return subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, env={**os.environ, "TZ": "UTC"}, timeout=60
    )


def exposure(unit: Path) -> float:
    said = analyze("security", "--offline=true", "--no-pager", unit)
    score = re.search(r"Overall exposure level for \S+: ([\d.]+)", said.stdout)
    assert score, said.stdout + said.stderr
    return float(score[1])


def install(*words: str) -> dict[str, Any]:
    """`install-systemd` in a process of its own, as a person calls it."""
    done = call(*words, "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "runner.py", "install-systemd", *words],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        cwd="/",
        timeout=60,
    )


# --- the units -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), ("--per-actor",)], ids=["whole", "per actor"])
def test_systemd_accepts_every_unit(shape: tuple[str, ...], tmp_path: Path) -> None:
    install("--dir", str(tmp_path), *shape)
    units = sorted(tmp_path.iterdir())
    said = analyze("verify", "--man=no", *units)
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")
    # It would say so if one were wrong.
    timer = tmp_path / "mt5-tests.timer"
    timer.write_text(timer.read_text().replace("Persistent=", "Persistant="))
    assert "Persistant" in analyze("verify", "--man=no", *units).stderr


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_is_exposed(name: str) -> None:
    assert exposure(SOURCE / name) <= MOST_EXPOSED


def test_the_score_is_earned_by_the_lines_that_every_service_has(tmp_path: Path) -> None:
    common = {
        name: re.search(r"# --- the same in every unit.*?(?=\n# [^-]|\n\n|\Z)", (SOURCE / name).read_text(), re.S)
        for name in SERVICES
    }
    texts = {found[0].split("\nPrivateNetwork")[0] for found in common.values() if found}
    assert None not in common.values()
    assert len(texts) == 1, "the hardening differs from unit to unit"
    bare = tmp_path / "mt5.service"
    bare.write_text((SOURCE / "mt5.service").read_text().replace(texts.pop(), ""))
    assert exposure(bare) > 2 * MOST_EXPOSED


@pytest.mark.parametrize("name", TIMERS)
def test_systemd_understands_when_a_timer_is_due(name: str) -> None:
    (when,) = read(SOURCE / name)["Timer.OnCalendar"]
    said = analyze("calendar", "--iterations=2", when)
    assert said.returncode == 0, said.stderr
    nights = re.findall(r"(?:Next elapse|Iter\S* #2): \w+ (\S+) (04:\d\d):00 UTC", said.stdout)
    assert len(nights) == 2, said.stdout
    assert nights[0][1] == nights[1][1]


def test_jobs_start_one_after_the_other_and_wait_for_each_other() -> None:
    due = {name.removesuffix(".timer"): read(SOURCE / name)["Timer.OnCalendar"][0] for name in TIMERS}
    assert set(due) == set(JOBS.values())
    assert len(set(due.values())) == len(due)
    order = sorted(due, key=lambda name: due[name])
    # The backup before the update that may need it; the report after everything that belongs to it.
    assert order.index("mt5-remote-backup") < order.index("mt5-update") < order.index("mt5-tests")
    assert order[-1] == "mt5-daily-report"
    for i, name in enumerate(order):
        unit = read(SOURCE / f"{name}.service")
        waits = {word.removesuffix(".service") for value in unit["Unit.After"] for word in value.split()}
        assert set(order[:i]) <= waits, f"{name} may run beside one that overruns"
        assert not set(order[i:]) & waits, "a circle"
        assert unit["Service.Type"] == ["oneshot"], "only a oneshot is waited for until it ends"
        assert unit["Service.TimeoutStartSec"], f"{name} may hang for ever, and everything behind it"


def test_every_unit_starts_a_command_that_exists() -> None:
    called = {}
    for name in SERVICES:
        for line in read(SOURCE / name)["Service.ExecStart"]:
            program, *words = line.split()
            if program == "/usr/bin/systemctl":
                assert words == ["--no-block", "try-restart", "mt5.service"]
                continue
            assert [program, words[0]] == ["/opt/mt5/.venv/bin/python", "/opt/mt5/runner.py"]
            args = runner.parser().parse_args([word.replace("%i", "collector") for word in words[1:]])
            if name != "mt5-update@.service":  # the same job to a given revision, as CI asks for it
                called.setdefault(name, args)
    assert {job: f"{unit}.service" for job, unit in JOBS.items()} == {
        args.handler.partition(":")[2].replace("_", "-"): name for name, args in called.items() if args.command == "job"
    }


def test_the_target_starts_every_actor() -> None:
    wanted = {word for line in read(SOURCE / "mt5.target")["Unit.Wants"] for word in line.split()}
    assert wanted == {f"mt5@{actor}.service" for actor in ACTORS}


@pytest.mark.parametrize("name", ["mt5.service", "mt5@.service"])
def test_the_system_is_supervised_the_way_its_supervisor_needs(name: str) -> None:
    unit = read(SOURCE / name)
    for key, value in {
        "Service.Type": "notify",
        "Service.NotifyAccess": "main",
        "Service.Restart": "always",  # a stop that nobody asked for may end with 0, too
        "Service.KillMode": "mixed",  # the supervisor ends its children in order; a signal to all would race it
        "Service.WatchdogSignal": "SIGTERM",
        "Service.OOMPolicy": "continue",
        "Unit.StartLimitIntervalSec": "0",
    }.items():
        assert unit[key] == [value], key
    assert int(unit["Service.WatchdogSec"][0]) >= 30
    assert int(unit["Service.TimeoutStopSec"][0]) >= 15  # a stop is promised within ten


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "mt5-restart.service"])
def test_only_what_must_may_write_the_checkout(name: str) -> None:
    unit = read(SOURCE / name)
    writable = set(" ".join(unit["Service.ReadWritePaths"]).split())
    assert "/var/lib/mt5" in writable
    assert ("/opt/mt5" in writable) == name.startswith("mt5-update")
    assert unit["Service.User"] == ["mt5"]


def test_root_does_one_thing_and_can_do_nothing_else() -> None:
    unit = read(SOURCE / "mt5-restart.service")
    assert "Service.User" not in unit
    assert unit["Service.CapabilityBoundingSet"] == [""]
    assert unit["Service.PrivateNetwork"] == ["yes"]
    assert "Service.ReadWritePaths" not in unit
    assert read(SOURCE / "mt5-restart.path")["Path.PathChanged"] == ["/var/lib/mt5/run/restart"]


# --- install-systemd -------------------------------------------------------------------------------------------------


def test_units_name_this_installation_and_no_default_is_left(tmp_path: Path) -> None:
    answer = install("--dir", str(tmp_path), "--user", "trading", "--home", "/srv/candles")
    assert answer["units"] == answer["written"] == sorted(path.name for path in tmp_path.iterdir())
    program = f"{sys.executable} {ROOT}/runner.py"
    unit = read(tmp_path / "mt5.service")
    assert unit["Service.ExecStart"] == [f"{program} up"]
    assert unit["Service.User"] == unit["Service.Group"] == ["trading"]
    assert unit["Service.ReadWritePaths"] == ["/srv/candles"]
    assert "MT5_HOME=/srv/candles" in unit["Service.Environment"][0].split()
    assert read(tmp_path / "mt5-update.service")["Service.ReadWritePaths"] == [f"/srv/candles {ROOT}"]
    assert read(tmp_path / "mt5-restart.path")["Path.PathChanged"] == ["/srv/candles/run/restart"]
    for path in tmp_path.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        # This checkout may itself lie below either, as that of the nightly tests does.
        others = path.read_text().replace(sys.executable, "").replace(str(ROOT), "")
        assert "/opt/mt5" not in others
        assert "/var/lib/mt5" not in others


def test_a_second_time_changes_nothing_and_a_changed_unit_is_written_anew(tmp_path: Path) -> None:
    install("--dir", str(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert install("--dir", str(tmp_path))["written"] == []
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    timer = tmp_path / "mt5-tests.timer"
    timer.write_text(timer.read_text() + "# by hand\n")
    assert install("--dir", str(tmp_path))["written"] == ["mt5-tests.timer"]
    assert "by hand" not in timer.read_text()


def test_what_an_older_version_installed_goes(tmp_path: Path) -> None:
    install("--dir", str(tmp_path))
    shutil.copy(tmp_path / "mt5-tests.timer", tmp_path / "mt5-gone.timer")
    assert install("--dir", str(tmp_path))["removed"] == ["mt5-gone.timer"]
    assert not (tmp_path / "mt5-gone.timer").exists()


def test_removal_takes_ours_and_leaves_what_is_not(tmp_path: Path) -> None:
    install("--dir", str(tmp_path))
    (tmp_path / "mt5-of-somebody.service").write_text("[Service]\nExecStart=/bin/true\n")
    (tmp_path / "mt5.service.d").mkdir()
    answer = install("--dir", str(tmp_path), "--remove")
    assert len(answer["removed"]) == len(list(systemd.rendered(site())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mt5-of-somebody.service", "mt5.service.d"]
    assert install("--dir", str(tmp_path), "--remove")["removed"] == []


def test_a_unit_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    foreign = tmp_path / "mt5-update.service"
    foreign.write_text("[Service]\nExecStart=/bin/true\n")
    done = call("--dir", str(tmp_path))
    assert (done.returncode, done.stderr) == (1, f"mt5: {foreign} is not one of ours: move it away first.\n")
    assert list(tmp_path.iterdir()) == [foreign]


def test_the_two_shapes_are_never_installed_side_by_side(tmp_path: Path) -> None:
    whole, single = (tmp_path / name for name in ("whole", "single"))
    install("--dir", str(whole))
    install("--dir", str(single), "--per-actor")
    assert {path.name for path in whole.iterdir()} ^ {path.name for path in single.iterdir()} == {
        "mt5.service",
        "mt5.target",
        "mt5@.service",
        "mt5-setup.service",
    }
    assert read(single / "mt5-restart.service")["Service.ExecStart"][0].endswith("try-restart mt5@*.service")
    for folder, words in ((whole, ["--per-actor"]), (single, [])):
        done = call("--dir", str(folder), *words)
        assert done.returncode == 1
        assert "the other shape" in done.stderr
        assert "--remove" in done.stderr


def site(**changes: Any) -> systemd.Site:
    known = {
        "program": ("/opt/here/bin/python", "/opt/here/runner.py"),
        "root": ROOT,
        "home": Path("/var/lib/mt5"),
        "user": "mt5",
        "group": "mt5",
        "per_actor": False,
    }
    return systemd.Site(**{**known, **changes})


def test_an_installed_package_has_no_checkout_to_update_or_test(tmp_path: Path) -> None:
    whole = {name for name, _ in systemd.rendered(site())}
    packaged = {name for name, _ in systemd.rendered(site(root=tmp_path))}
    timed = {f"mt5-{job}.{kind}" for job in ("tests", "update") for kind in ("service", "timer")}
    assert whole - packaged == timed | {"mt5-update@.service"}


@pytest.mark.parametrize("name", ["mt5-update.service", "mt5-update@.service"])
def test_an_update_that_is_stopped_has_time_to_put_everything_back(name: str) -> None:
    unit = read(SOURCE / name)
    assert unit["Service.KillMode"] == ["mixed"], "git and pip must not be ended under it"
    assert unit["Service.TimeoutStopSec"] == ["15min"]


def test_a_path_that_holds_a_default_is_replaced_once() -> None:
    units = dict(systemd.rendered(site(home=Path("/opt/mt5/var/lib/mt5"), user="mt5x")))
    assert "\nReadWritePaths=/opt/mt5/var/lib/mt5\n" in units["mt5.service"]
    assert "\nUser=mt5x\n" in units["mt5.service"]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--user", "root"), 2, '"root" cannot be the account'),
        (("--user", "a b\nc"), 2, "cannot be the account"),
        (("--home", "/srv/my candles"), 1, "/srv/my candles has characters that units would have to escape"),
        (("--home", "/srv/100%"), 1, "has characters"),
    ],
)
def test_what_a_unit_cannot_hold_is_refused(words: tuple[str, ...], code: int, sentence: str, tmp_path: Path) -> None:
    done = call("--dir", str(tmp_path / "units"), *words)
    assert done.returncode == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "units").exists()


def test_an_installation_that_the_sandbox_would_hide_is_told(tmp_path: Path) -> None:
    answer = install("--dir", str(tmp_path), "--home", "/home/me/var")
    assert any("ProtectHome" in step for step in answer["next"])


def test_an_ordinary_user_is_told_who_may_write_the_systems_folder() -> None:
    code = "import sys, runner; sys.exit(runner.main(['install-systemd']))"
    process = python(code, user=ordinary_user())
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said == "mt5: Only root may write /etc/systemd/system: run this with sudo, or give --dir.\n"


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"cannot be written: "):
        systemd.install(runner.parser().parse_args(["install-systemd", "--dir", str(tmp_path / "file" / "units")]))
