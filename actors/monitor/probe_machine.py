"""This machine's checks: room on its disks, certificates that end, containers, and the CI runner's units."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from actors.core.sizes import human
from actors.monitor.watch import Probe, in_thread, result, words
from schema.health import CheckResult
from schema.health import Status as Verdict
from schema.settings import Health

CERTIFICATE_CRITICAL: Final = 3  # days before its end
CERTIFICATE_BYTES: Final = 1024**2
DOCKER_BYTES: Final = 4 * 1024**2
PROJECT: Final = "mt5"  # of docker-compose.yml
MOST_UNITS: Final = 32
UNIT_WORDS: Final = {"active": "works", "reloading": "is reloading", "activating": "is starting"}


@dataclass(slots=True)
class MachineProbes:
    settings: Health
    home: Path

    def probes(self) -> list[Probe]:
        disks = [Probe(f"disk.{name}", _disk(name, path, self.settings)) for name, path in self._disks().items()]
        certificates = [
            Probe(f"certificate.{place}", _certificate(place, self.settings), every=20)
            for place in dict.fromkeys(self.settings.certificates)
        ]
        return [*disks, *certificates, Probe("container", self.containers), Probe("runner", self.runner, every=2)]

    def _disks(self) -> dict[str, Path]:
        """Folders by the short name that their checks have: the last part of the path, numbered where two have the same."""
        found = {"home": self.home}
        for folder in dict.fromkeys(self.settings.disks):
            path = Path(folder).expanduser().absolute()
            stem = path.name or "root"
            name, number = stem, 1
            while name in found:
                number += 1
                name = f"{stem}-{number}"
            found[name] = path
        return found

    # --- containers --------------------------------------------------------------------------------------------------

    async def containers(self) -> list[CheckResult]:
        """Docker's own word of the containers that must run; where there is no Docker there is nothing to say."""
        socket = Path(self.settings.docker_socket)
        if not await in_thread("docker", socket.is_socket):
            if self.settings.containers:
                way = "start Docker, or mend [health] docker_socket"
                return [
                    result(
                        "container", "critical", f"There is no Docker at {socket}, whose containers must run: {way}."
                    )
                ]
            return [result("container", "skipped", f"There is no Docker here ({socket}).")]
        if not os.access(socket, os.R_OK | os.W_OK):
            way = "add this user to the group docker, or name no docker_socket"
            return [result("container", "skipped", f"{socket} may not be used by this user: {way}.")]
        import aiohttp  # late: `up` is ready sooner, and most machines have no Docker

        connector = aiohttp.UnixConnector(path=str(socket))
        async with aiohttp.ClientSession(connector=connector) as session:
            try:
                async with session.get("http://docker/containers/json", params={"all": "1"}) as answer:
                    if answer.status != 200:
                        return [result("container", "critical", f"Docker answers {answer.status}: see `docker ps`.")]
                    listed = await answer.json(content_type=None)
            except (aiohttp.ClientError, ValueError) as error:
                way = "start it again with `systemctl restart docker`"
                return [result("container", "critical", f"Docker does not answer ({words(error)}): {way}.")]
        return self._judged(listed)

    def _judged(self, listed: Sequence[dict[str, Any]]) -> list[CheckResult]:
        found: dict[str, dict[str, Any]] = {}
        for one in listed:
            labels = one.get("Labels") or {}
            names = [str(name).lstrip("/") for name in one.get("Names") or ()]
            ours = labels.get("com.docker.compose.project") == PROJECT
            for name in names:
                if name in self.settings.containers or (ours and not self.settings.containers):
                    found[name] = one
        out = [_container(name, found[name]) for name in sorted(found)]
        for name in self.settings.containers:
            if name not in found:
                way = "start it with `docker compose up -d`"
                out.append(result(f"container.{name}", "critical", f"There is no container {name}: {way}."))
        if not out:
            return [result("container", "skipped", f"Docker runs no container of the project {PROJECT}.")]
        return out

    # --- the CI runner -----------------------------------------------------------------------------------------------

    async def runner(self) -> list[CheckResult]:
        """`systemctl is-active` of the runner's units; without systemd, or without units, there is no runner here."""
        if shutil.which("systemctl") is None:
            return [result("runner", "skipped", "There is no systemd here.")]
        pattern = self.settings.runner_units
        code, out = await _systemctl(
            "list-unit-files", "--type=service", "--plain", "--no-legend", "--no-pager", pattern
        )
        names = [line.split()[0] for line in out.splitlines() if line.split()]
        units = [name for name in names if not name.endswith("@.service")][:MOST_UNITS]
        if not units:
            return [result("runner", "skipped", f"No unit {pattern} is installed: no CI runner is on this machine.")]
        code, out = await _systemctl("is-active", *units)
        states = out.split()
        if len(states) != len(units):
            return [result("runner", "warning", f"systemctl does not tell how the CI runner is (exit code {code}).")]
        return [_unit(unit, state) for unit, state in zip(units, states, strict=True)]


def _unit(unit: str, state: str) -> CheckResult:
    name = f"runner.{unit.removesuffix('.service')}"
    if state in UNIT_WORDS:
        verdict: Verdict = "ok" if state != "activating" else "warning"
        return result(name, verdict, f"The CI runner's {unit} {UNIT_WORDS[state]}.")
    way = f"`systemctl restart {unit}`; `journalctl -u {unit}` says why"
    return result(name, "critical", f"The CI runner's {unit} is {state}: {way}.")


async def _systemctl(*arguments: str) -> tuple[int, str]:
    """Exit code and output; killed with the look that waits for it."""
    process = await asyncio.create_subprocess_exec(
        "systemctl",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
    )
    try:
        out, _ = await process.communicate()
    except asyncio.CancelledError:
        if process.returncode is None:
            process.kill()
        raise
    return process.returncode or 0, out.decode(errors="replace")


def _container(name: str, one: dict[str, Any]) -> CheckResult:
    state, status = str(one.get("State", "")), str(one.get("Status", ""))
    check = f"container.{name}"
    if state != "running":
        return result(check, "critical", f"{name} is {state} ({status}): `docker logs {name}` says why.")
    if "unhealthy" in status:
        return result(check, "critical", f"{name} runs and is unhealthy ({status}): `docker logs {name}` says why.")
    if "starting" in status:
        return result(check, "skipped", f"{name} is starting ({status}).")
    return result(check, "ok", f"{name} runs ({status}).")


def _disk(name: str, path: Path, settings: Health) -> Any:
    def look() -> list[CheckResult]:
        check = f"disk.{name}"
        try:
            room = os.statvfs(path)
        except OSError as error:
            way = "mount it, or take it out of [health] disks"
            return [result(check, "critical", f"{path} cannot be looked at ({error.strerror}): {way}.")]
        free, size = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
        share = free / size if size else 0.0
        files = room.f_favail / room.f_files if room.f_files else 1.0
        said = f"{human(free)} of {human(size)} are free under {path} ({share:.1%})"
        if files < share:
            said += f", and {files:.1%} of its files"
        least = min(share, files)
        verdict: Verdict = "ok"
        if least < settings.disk_free:
            verdict = "critical" if least < settings.disk_critical else "warning"
            said += ": a full disk stops the streams and the archive; move or delete something"
        return [result(check, verdict, f"{said}.", value=round(100 * least, 3), unit="% free")]

    return lambda: in_thread(f"disk.{name}", look)


def _certificate(place: str, settings: Health) -> Any:
    check = f"certificate.{place}"

    def look() -> list[CheckResult]:
        from cryptography import x509  # late: rarely needed, and large

        try:
            pem = _pem(place, settings.timeout_seconds)
            ends = min(one.not_valid_after_utc for one in x509.load_pem_x509_certificates(pem))
        except (OSError, ValueError) as error:
            return [result(check, "critical", f"The certificate of {place} cannot be read: {words(error)}.")]
        days = (ends - datetime.now(UTC)) / timedelta(days=1)
        said = f"The certificate of {place} ends on {ends:%Y-%m-%d}"
        if days > settings.certificate_days:
            return [result(check, "ok", f"{said}, in {days:,.0f} days.", value=round(days, 2), unit="days")]
        verdict: Verdict = "critical" if days <= CERTIFICATE_CRITICAL else "warning"
        when = f"in {days:.0f} days" if days > 0 else f"{-days:.0f} days ago"
        return [result(check, verdict, f"{said}, {when}: renew it.", value=round(days, 2), unit="days")]

    return lambda: in_thread(check, look)


def _pem(place: str, timeout: float) -> bytes:
    """A file's content, or what a server shows: whether it is to be trusted is its clients' question, not this one's."""
    host, colon, port = place.rpartition(":")
    if "/" in place or not colon or not port.isdigit():
        with Path(place).expanduser().open("rb") as file:
            return file.read(CERTIFICATE_BYTES)
    return ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=timeout).encode()
