"""Every shared socket: subjects, topology, codec, client, consume, supervise, store and telemetry."""
