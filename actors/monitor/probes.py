"""Every check of the settings, over the servers that there are."""

from __future__ import annotations

from pathlib import Path

from actors.monitor.journal import Journal
from actors.monitor.probe_agents import AgentProbes
from actors.monitor.probe_database import DatabaseProbes
from actors.monitor.probe_endpoints import EndpointProbes
from actors.monitor.probe_feeds import FeedProbes
from actors.monitor.probe_machine import MachineProbes
from actors.monitor.probe_nats import NatsProbes
from actors.monitor.watch import Probe
from bus.client import Bus
from bus.permissions import OPERATOR, users
from bus.status import Process
from bus.store import Store
from schema.settings import Settings

ACTORS = tuple(user.name for user in users() if user.name != OPERATOR)


def all_probes(
    settings: Settings,
    home: Path,
    *,
    bus: Bus | None,
    store: Store | None,
    pooled: Store | None = None,
    gateway: str | None = None,
    journal: Journal | None = None,
    own: Process | None = None,
) -> list[Probe]:
    """``store`` connects directly, ``pooled`` through PgBouncer where that is another URL; ``own`` is the asker's process."""
    found = [
        *DatabaseProbes(store, pooled, settings.health, home, journal).probes(),
        *(NatsProbes(bus, settings, ACTORS, own).probes() if bus is not None else ()),
        *FeedProbes(bus, store, settings).probes(),
        *EndpointProbes(settings, gateway).probes(),
        *AgentProbes(bus, store, settings, journal).probes(),
        *MachineProbes(settings.health, home).probes(),
    ]
    names = [probe.name for probe in found]
    if len(set(names)) != len(names):
        raise RuntimeError(f"two probes have one name: {sorted(name for name in names if names.count(name) > 1)}")
    return found
