"""Starting several processes as one run: on a TPU pod, or where flags say so."""

from __future__ import annotations

import logging
import os
import urllib.request

import jax

from tokenlora_jax.config import InputError, MeshConfig

# Where a Google Cloud TPU machine is told the hosts of its slice.
_HOSTS = (
  "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
  "worker-network-endpoints"
)


def start_processes(config: MeshConfig) -> None:
  """Joins this process with the others of the run, if there are any.

  Must come before anything that asks JAX for devices. Only process 0 warns from
  then on.

  Args:
    config: says how many processes there are, unless this is a TPU pod.

  Raises:
    InputError: the processes cannot be joined.
  """
  try:
    if config.processes > 1:
      jax.distributed.initialize(
        config.coordinator, config.processes, config.process
      )
    elif tpu_hosts() > 1:
      jax.distributed.initialize()
    else:
      return
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().splitlines()[0]
    raise InputError(
      f"mesh.processes: the processes cannot be joined: {reason}"
    ) from None
  if jax.process_index() > 0:
    logging.getLogger("tokenlora_jax").setLevel(logging.ERROR)


def tpu_hosts() -> int:
  """Returns how many hosts of TPUs start together, 1 where there is no TPU.

  Environment variables say it where Kubernetes starts the hosts, else the
  machine's metadata. JAX is not started.

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
  except OSError:  # Not a machine of Google Cloud.
    return ""
