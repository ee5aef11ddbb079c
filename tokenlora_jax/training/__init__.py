"""Adapters and routers learn."""
