"""Mixing: what gates mean (rules), who decides them (routers)."""
