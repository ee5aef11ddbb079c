"""How JAX starts in every test, the package's doctests included."""

import os

# Before JAX is imported: eight devices on any machine, whatever it holds.
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = (
  f"{flags} --xla_force_host_platform_device_count=8".strip()
)
# As `cli.give_threads` does: devices may wait for each other in several threads.
os.environ["PJRT_NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"
# A TPU's or GPU's default would round what golden tests compare.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"

# Tests need no network; a loader that would reach for it fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Frees what a module has compiled.

  A process may map only so many pieces of memory (vm.max_map_count), each program
  has several, and XLA ends with a segmentation fault where there are no more.
  """
  yield
  jax.clear_caches()
