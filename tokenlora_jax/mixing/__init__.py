"""Mixing: rules combine adapters by gates, and routers compute the gates."""
