"""The units under a real systemd, on a machine booted for them: the whole system works inside its sandbox.

The tests are one story in order: installed, started, trained, restarted, frozen, stopped, removed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Final

import pytest

from tests.servers import wait_until
from tests.torture.booted import CHECKOUT, Machine, booted

pytestmark = [pytest.mark.torture, pytest.mark.timeout(600)]

MT5: Final = f"{CHECKOUT}/.venv/bin/python {CHECKOUT}/runner.py"
JOBS: Final = (  # in the order of their timers
    "github-runner-check",
    "mt5-remote-backup",
    "mt5-update",
    "mt5-vuln-check",
    "mt5-tests",
    "mt5-daily-report",
)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with booted() as machine:
        machine.bring_checkout()
        yield machine


def drop_in(machine: Machine, unit: str, *lines: str) -> None:
    """As `systemctl edit` does it; without lines it is taken back."""
    folder = f"/etc/systemd/system/{unit}.d"
    machine.run('rm -rf "$1"', folder)
    if lines:
        machine.run('mkdir -p "$1" && cat >"$1/test.conf"', folder, input="\n".join(["[Service]", *lines, ""]).encode())
    machine.run("systemctl daemon-reload")


def restarted(machine: Machine, before: str) -> bool:
    return machine.show("mt5", "ActiveState") == "active" and machine.show("mt5", "MainPID") != before


def test_installing_makes_the_account_its_folders_and_the_units(machine: Machine) -> None:
    first = json.loads(machine.run(f"{MT5} install-systemd --json"))
    assert first["written"] == first["units"]
    assert f"chown --recursive mt5: {CHECKOUT}  # mt5-update writes it" in first["next"]
    machine.run(f"chown --recursive mt5: {CHECKOUT}")
    second = json.loads(machine.run(f"{MT5} install-systemd --json"))
    assert second["written"] == []
    assert not any(step.startswith("chown") for step in second["next"])
    entries = "/var/lib/mt5 /var/lib/mt5/run /etc/mt5 /etc/mt5/mt5.toml /etc/mt5/mt5.env"
    assert machine.run(f"stat --format='%a %U:%G' {entries}").splitlines() == [
        "700 mt5:mt5",
        "700 mt5:mt5",
        "750 root:mt5",
        "640 root:mt5",
        "600 root:root",
    ]
    assert machine.run("getent passwd mt5").strip().endswith(":/var/lib/mt5:/usr/sbin/nologin")


def test_what_the_account_cannot_run_is_not_installed(machine: Machine) -> None:
    machine.run(f"chmod 700 {CHECKOUT} && chown root: {CHECKOUT}")
    said = machine.run(f"{MT5} install-systemd 2>&1; echo $?", check=False)
    machine.run(f"chmod 755 {CHECKOUT} && chown mt5: {CHECKOUT}")
    assert said.startswith(f"mt5: mt5 cannot run {MT5} (")
    assert said.endswith("\n1\n")


def test_the_system_starts_in_its_sandbox(machine: Machine) -> None:
    machine.run("systemctl enable --now mt5.service mt5-restart.path", check=False)
    assert machine.show("mt5", "ActiveState") == "active", machine.journal("mt5")
    assert machine.show("mt5", "StatusText") == "Ready: http://127.0.0.1:8001/"
    pids = machine.run("cat /sys/fs/cgroup/system.slice/mt5.service/cgroup.procs").split()
    assert len(pids) > 10  # servers and actors
    for pid in pids:
        status = machine.run("cat /proc/$1/status", pid, check=False)
        if status:  # a backend of PostgreSQL may be gone by now
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert (fields["NoNewPrivs"], fields["Seccomp"], int(fields["CapBnd"], 16)) == ("1", "2", 0)
            assert fields["Uid"].split()[0] == machine.run("id -u mt5").strip()
    inside = f"nsenter --target {machine.show('mt5', 'MainPID')} --mount"
    for place in (CHECKOUT, "/etc/mt5", "/usr"):
        assert "Read-only" in machine.run(f"{inside} touch {place}/x 2>&1", check=False)


def test_a_job_finds_the_system_that_runs_from_its_own_sandbox(machine: Machine) -> None:
    """By ready.json and by the process that it names: `topology` asks that system's nats-server."""
    drop_in(machine, "mt5-remote-backup.service", "ExecStart=", f"ExecStart={MT5} topology")
    machine.run("systemctl start mt5-remote-backup", check=False)
    assert machine.show("mt5-remote-backup", "Result") == "success", machine.journal("mt5-remote-backup")
    drop_in(machine, "mt5-remote-backup.service")


def test_a_model_is_trained_and_served_in_it(machine: Machine) -> None:
    """The demo trains, converts, serves and scores: what ONNX Runtime, numpy and PostgreSQL ask of the kernel is allowed."""
    machine.run("systemctl stop mt5")
    drop_in(machine, "mt5.service", "ExecStart=", f"ExecStart={MT5} demo", "Restart=no")
    machine.run("systemctl start mt5")
    ended = ("inactive", "failed")
    wait_until(
        lambda: "(unproven)" in machine.journal("mt5") or machine.show("mt5", "ActiveState") in ended,
        400,
        "a signal of a trained model",
    )
    said = machine.journal("mt5")
    assert "(unproven)" in said, said
    machine.run("systemctl stop mt5")
    assert machine.show("mt5", "Result") == "success"
    assert machine.run("ls /var/lib/mt5/models").split()
    drop_in(machine, "mt5.service")


def test_the_account_restarts_the_system_by_touching_a_file_and_what_is_stopped_stays_so(machine: Machine) -> None:
    machine.run("systemctl start mt5")
    before = machine.show("mt5", "MainPID")
    touch = "runuser --user mt5 -- touch /var/lib/mt5/run/restart"
    machine.run(touch)
    wait_until(lambda: restarted(machine, before), 60, "it is restarted")
    assert "Permission denied" in machine.run(
        "runuser --user mt5 -- touch /etc/systemd/system/x.service 2>&1", check=False
    )
    assert machine.run("runuser --user mt5 -- systemctl restart mt5 2>&1; echo $?", check=False).split()[-1] != "0"
    machine.run("systemctl stop mt5")
    machine.run(touch)
    wait_until(lambda: machine.show("mt5-restart", "ActiveState") == "inactive", 20, "the wish was looked at")
    time.sleep(1)  # nothing to wait for: that it is not started is the point
    assert machine.show("mt5", "ActiveState") == "inactive"


def test_a_killed_or_frozen_supervisor_is_started_anew(machine: Machine) -> None:
    drop_in(machine, "mt5.service", "WatchdogSec=6", "TimeoutAbortSec=10", "RestartSec=1")
    machine.run("systemctl start mt5")
    for number in ("KILL", "STOP"):
        before = machine.show("mt5", "MainPID")
        machine.run(f"kill -{number} {before}")
        wait_until(lambda before=before: restarted(machine, before), 90, f"it is back after SIG{number}")
    journal = machine.journal("mt5")
    assert "status=9/KILL" in journal
    assert "Watchdog timeout (limit 6s)!" in journal
    drop_in(machine, "mt5.service")


def test_a_stop_takes_ten_seconds_at_most_and_leaves_nothing(machine: Machine) -> None:
    began = time.monotonic()
    machine.run("systemctl stop mt5")
    assert time.monotonic() - began < 10
    assert machine.show("mt5", "Result") == "success"
    assert machine.run("pgrep --uid mt5 --list-name", check=False) == ""
    assert not machine.run("ls /var/lib/mt5/ready.json 2>/dev/null", check=False)


def test_jobs_that_were_missed_are_caught_up_with_one_after_the_other(machine: Machine) -> None:
    for job in JOBS:
        drop_in(machine, f"{job}.service", "ExecStart=", 'ExecStart=/bin/sh -c "echo begin; sleep 0.3; echo end"')
    machine.run(
        "mkdir -p /var/lib/systemd/timers; systemctl --quiet enable $1;"
        "for timer in $1; do touch --date '3 days ago' /var/lib/systemd/timers/stamp-$timer; done;"
        "systemctl stop timers.target && systemctl start timers.target",
        " ".join(f"{job}.timer" for job in JOBS),
    )
    lines = 'journalctl --no-pager --output=json _COMM=sh | grep -E "\\"(begin|end)\\""'

    def said() -> list[tuple[str, str]]:
        entries = map(json.loads, machine.run(lines, check=False).splitlines())
        return [(entry["_SYSTEMD_UNIT"].removesuffix(".service"), entry["MESSAGE"]) for entry in entries]

    wait_until(lambda: len(said()) == 2 * len(JOBS), 60, "all have run")
    assert said() == [(job, word) for job in JOBS for word in ("begin", "end")]
    for job in JOBS:
        drop_in(machine, f"{job}.service")


def test_an_actor_of_its_own_unit_works_on_given_servers(machine: Machine) -> None:
    """A plain `mt5 up` on another home lends its servers; setup applies the topology before the actors start."""
    machine.run(f"{MT5} install-systemd --remove && {MT5} install-systemd --per-actor")
    machine.run(
        "systemd-run --unit=lender --uid=mt5 --property=Type=notify --property=StateDirectory=lender"
        f" --setenv=MT5_HOME=/var/lib/lender --setenv=MT5_GATEWAY_PORT=0 {MT5} up trainer"
    )
    ready = json.loads(machine.run("cat /var/lib/lender/ready.json"))
    config = machine.run("cat /var/lib/lender/nats/nats.conf")
    address = ready["nats"].rpartition("@")[2]
    lines = [f"MT5_DATABASE_URL={ready['database']}", "MT5_GATEWAY_PORT=0"]
    machine.run("cat >/etc/mt5/mt5.env", input="\n".join(lines).encode())
    for actor in ("operator", "recorder", "features"):
        password = config.partition(f'user: "{actor}", password: "')[2].partition('"')[0]
        machine.run(
            'cat >"/etc/mt5/$1.env"', actor, input=f"MT5_NATS_URL=nats://{actor}:{password}@{address}\n".encode()
        )
    machine.run("systemctl start mt5@recorder mt5@features")
    assert machine.show("mt5-setup", "Result") == "success"
    assert machine.show("mt5-setup", "ExecMainStartTimestamp"), "it has not run"
    before = machine.show("mt5@recorder", "MainPID")
    for actor in ("recorder", "features"):
        assert machine.show(f"mt5@{actor}", "StatusText") == f"Ready: {actor}"
    # The target stands once every actor does, and these two are not to wait for that.
    refused = machine.run(
        "systemctl start mt5@scorer 2>&1; systemctl show --property=AssertResult mt5@scorer", check=False
    )
    assert "AssertResult=no" in refused, "one that has no server's address starts none of its own"
    machine.run("systemctl start mt5-restart.path && runuser --user mt5 -- touch /var/lib/mt5/run/restart")
    wait_until(
        lambda: (
            machine.show("mt5@recorder", "MainPID") not in (before, "0")
            and machine.show("mt5@recorder", "ActiveState") == "active"
        ),
        60,
        "the target's restart reaches its actors",
    )
    machine.run("systemctl stop lender")


def test_removal_leaves_no_unit_and_keeps_the_state(machine: Machine) -> None:
    machine.run(f"{MT5} install-systemd --remove")
    assert machine.run("pgrep --uid mt5 --list-name", check=False) == ""
    assert machine.run("find /etc/systemd/system -name '*mt5*' -not -type d", check=False) == ""
    assert machine.run("ls /var/lib/mt5/logs/*.log /etc/mt5/mt5.toml")
    assert machine.run("systemctl list-unit-files --no-legend 'mt5*' 'github*'", check=False) == ""
