"""Devices and processes: the mesh, the sharding table, chips' peak rates."""
