"""Training of adapters and routers."""
