"""How a run is doing, from its folder alone: read while it goes on, without a lock, without torch."""
