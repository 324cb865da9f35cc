"""A machine of its own that systemd has booted: this one's files under namespaces, and whatever it writes is thrown away.

The root is an overlay of ours in memory, processes, network, IPC, host name and control groups are its own, and /proc/sys
and /sys cannot be written. Nothing of this machine is changed, and killing its first process ends all of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from tests.servers import ROOT, wait_until

SYSTEMD: Final = "/lib/systemd/systemd"
CHECKOUT: Final = "/opt/mt5"
ENVIRONMENT: Final = Path("/opt/environment")  # where our own shows, which may lie behind a closed folder
VERSION: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
OURS: Final = ("schema", "bus", "actors", "deploy", "commands", "runner.py", "nats.conf", "pyproject.toml", "docs")

# $1: a folder to build in; $2: our environment
BOOT: Final = f"""
set -e
mount -t tmpfs -o size=4g tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount --rbind /dev dev
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mkdir -p .{ENVIRONMENT} .{CHECKOUT} old
mount --bind "$2" .{ENVIRONMENT}
# Only what the units need is started: what sets up a machine has been done, and must not be done to ours.
rm -rf etc/systemd/system
mkdir -p etc/systemd/system
for folder in sysinit local-fs multi-user timers sockets basic; do
  for unit in lib/systemd/system/$folder.target.wants/*; do
    case "${{unit##*/}}" in
      "*" | systemd-journald* | dbus*) ;;
      *) ln -sf /dev/null "etc/systemd/system/${{unit##*/}}" ;;
    esac
  done
done
echo 0123456789abcdef0123456789abcdef >etc/machine-id
hostname booted
pivot_root . old
umount -l /old
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
  {SYSTEMD} --system --unit=multi-user.target --log-target=journal --show-status=no
"""


class Machine:
    """A booted machine; ``run`` is a root shell on it."""

    def __init__(self, init: int) -> None:
        self._init = init

    def run(self, script: str, *words: str, check: bool = True, **options: Any) -> str:
        """What a shell script wrote to its stdout; ``words`` are its arguments."""
        enter = ["nsenter", "--target", str(self._init), "--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net"]
        clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"]
        done = subprocess.run(
            [*enter, *clean, "bash", "-c", script, "bash", *words], capture_output=True, cwd="/", check=False, **options
        )
        said = done.stdout.decode(errors="replace")
        assert not check or done.returncode == 0, f"{script}\n{said}{done.stderr.decode(errors='replace')}"
        return said

    def show(self, unit: str, name: str) -> str:
        return self.run('systemctl show --property="$2" --value "$1"', unit, name).strip()

    def journal(self, unit: str) -> str:
        return self.run('journalctl --no-pager --output=cat --unit="$1"', unit)

    def bring_checkout(self) -> None:
        """This checkout under /opt/mt5 with an environment, as somebody would clone and install it."""
        packed = subprocess.run(
            ["tar", "--create", "--exclude=__pycache__", *OURS], cwd=ROOT, capture_output=True, check=True
        ).stdout
        libraries = ENVIRONMENT / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        self.run(
            f"""set -e
            tar --extract --no-same-owner --directory {CHECKOUT}
            /usr/bin/{VERSION} -m venv --without-pip {CHECKOUT}/.venv
            echo {libraries} >{CHECKOUT}/.venv/lib/{VERSION}/site-packages/libraries.pth""",
            input=packed,
        )


@contextlib.contextmanager
def booted() -> Iterator[Machine]:
    """A machine that has booted; skips where this one may not make such a thing."""
    if os.geteuid() != 0:
        pytest.skip("only root can boot a machine in namespaces")
    for program in (SYSTEMD, "unshare", "nsenter", f"/usr/bin/{VERSION}"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: systemd, util-linux, python3-venv)")
    groups = re.search(r"^\S+ \S+ \S+ \S+ (\S+) .* - cgroup2 ", Path("/proc/self/mountinfo").read_text(), re.MULTILINE)
    if groups is None:
        pytest.skip("no cgroup2 file system is mounted")
    group = Path(groups[1]) / f"mt5-booted-{os.getpid()}"
    folder = Path(tempfile.mkdtemp(prefix="mt5-booted-", dir="/dev/shm"))
    group.mkdir()
    namespaces = ["--mount", "--pid", "--cgroup", "--uts", "--ipc", "--net", "--fork", "--kill-child"]
    # It joins the group before it gets a namespace of groups, whose root that group then is.
    join = ["bash", "-c", 'echo $$ >"$1/cgroup.procs" && shift && exec "$@"', "bash", str(group)]
    boot = ["bash", "-c", BOOT, "bash", str(folder), sys.prefix]
    process = subprocess.Popen(
        [*join, "unshare", *namespaces, "--propagation", "private", *boot],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )
    try:

        def first() -> list[psutil.Process]:
            return [child for child in psutil.Process(process.pid).children() if child.name() == "systemd"]

        try:
            wait_until(lambda: process.poll() is not None or first(), 20, "systemd is started")
        except psutil.NoSuchProcess:
            pass
        if process.poll() is not None:
            assert process.stdout is not None
            pytest.skip(f"this machine cannot boot another: {process.stdout.read().decode(errors='replace').strip()}")
        machine = Machine(first()[0].pid)
        wait_until(
            lambda: machine.run("systemctl is-system-running", check=False).strip() in ("running", "degraded"),
            60,
            "it has booted",
        )
        yield machine
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
        wait_until(lambda: "populated 0" in (group / "cgroup.events").read_text(), 20, "everything on it has ended")
        for below in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            below.rmdir()
        group.rmdir()
        folder.rmdir()
