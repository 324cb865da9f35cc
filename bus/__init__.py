"""Every shared socket: subjects, topology, codec, client, consume, supervise, store and telemetry."""

from __future__ import annotations

from bus import lean

lean.install()
