"""Mixing: what gates mean (rules), who decides them (routers), what routers
look at (encoders)."""
