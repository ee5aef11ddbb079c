"""Devices and processes: the mesh, the table of shardings, chips."""
