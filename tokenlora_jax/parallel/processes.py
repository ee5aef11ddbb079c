"""Joins several processes into one run, on a TPU pod or by flags."""

from __future__ import annotations

import logging
import os
import socket
import time
import urllib.request

import jax

from tokenlora_jax.config import InputError, MeshConfig, first_line

# Seconds to wait for process 0, as long as JAX itself waits for processes.
WAIT = 300

# The metadata address with the hosts of a Google Cloud TPU machine's slice.
_HOSTS = (
  "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
  "worker-network-endpoints"
)


def start_processes(config: MeshConfig) -> None:
  """Joins this process with the others of the run, if there are any.

  Call it before anything that asks JAX for devices. Afterwards only process 0
  logs warnings.

  Args:
    config: coordinator and processes; not needed on a TPU pod.

  Raises:
    InputError: process 0 does not answer, or JAX cannot join the processes.
  """
  if config.processes > 1:
    # With a wrong address JAX itself would wait five minutes in silence, and
    # then abort with a stack trace.
    host, _, port = config.coordinator.rpartition(":")
    if config.process == 0:
      _check_free(int(port))
    else:
      _wait_for(host.strip("[]"), int(port))
    given = config.coordinator, config.processes, config.process
  elif tpu_hosts() > 1:
    given = ()
  else:
    return
  try:
    jax.distributed.initialize(*given)
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f"mesh.processes: the processes cannot be joined: {first_line(error)}"
    ) from None
  if jax.process_index() > 0:
    logging.getLogger("tokenlora_jax").setLevel(logging.ERROR)


def _check_free(port: int) -> None:
  """Raises `InputError` unless process 0 can listen on a port."""
  try:
    socket.create_server(("", port)).close()
  except OSError as error:
    reason = os.strerror(error.errno)
    raise InputError(
      f"mesh.coordinator: port {port} cannot be listened on ({reason})"
    ) from None


def _wait_for(host: str, port: int) -> None:
  """Waits until process 0 listens."""
  until = time.monotonic() + WAIT
  while True:
    try:
      socket.create_connection((host, port), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() >= until:
        raise InputError(
          f"mesh.coordinator: {host!r} does not answer on port {port}"
          f" ({error.strerror or error}); does process 0 run there?"
        ) from None
    time.sleep(1)


def tpu_hosts() -> int:
  """Returns the number of TPU hosts in this pod slice, 1 without TPUs.

  Reads environment variables if Kubernetes started the hosts, else the
  machine's metadata. Does not start JAX.

  Example:
    >>> tpu_hosts()
    1
  """
  # JAX sets this when it is imported on a machine with TPUs.
  if "tpu" not in (jax.config.jax_platforms or ""):
    return 1
  names = os.environ.get("TPU_PROCESS_ADDRESSES")
  names = names or os.environ.get("TPU_WORKER_HOSTNAMES")
  if not names and "TPU_SKIP_MDS_QUERY" not in os.environ:
    names = _metadata()
  slices = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
  return len((names or "").split(",")) * slices


def _metadata() -> str:
  request = urllib.request.Request(
    _HOSTS, headers={"Metadata-Flavor": "Google"}
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as reply:
      return reply.read().decode()
  except OSError:  # Not a Google Cloud machine.
    return ""
