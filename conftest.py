"""How JAX starts in every test, the package's doctests included."""

import os
from pathlib import Path

# Before JAX is imported: eight devices on any machine, whatever it holds.
# Compiling takes longer than running what tests run, so LLVM optimises little.
# What XLA itself does with a program stays the same (tests/test_program.py).
FLAGS = (
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  # A fusion's code is made in a third of the time without MLIR, and a small
  # module had better not be cut in many.
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
)
# Once each, in a worker of pytest-xdist too: they are part of the cache's keys.
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*given, *FLAGS]))
# What one test or child process compiles, the next one reads.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(Path(__file__).parent / ".pytest_cache" / "xla"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# JAX writes an entry in place. A process that reads it half written, because
# another is at it or was killed, warns and compiles. pyproject.toml says the
# same to pytest, this to the child processes.
os.environ["PYTHONWARNINGS"] = (
  "ignore:Error reading persistent compilation cache entry"
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

# While the hook below loads a module, Python looks for compiled files of another
# name: what a module of ours imports first would be compiled from its source.
import beartype  # noqa: E402, F401
import flax.nnx  # noqa: E402, F401
import grain  # noqa: E402, F401
import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
import optax  # noqa: E402, F401
import orbax.checkpoint  # noqa: E402, F401
import pytest  # noqa: E402

# Half of what Linux allows by default (vm.max_map_count).
MAPS = 32_000
# The package's annotations, shapes included, are checked while tests run. Those
# of the tasks are not: they have no arrays, and tests call them millions of times.
ROOMS = [
  path.relative_to(Path(__file__).parent).with_suffix("")
  for folder in ("tokenlora_jax", "tokenlora_jax/data")
  for path in sorted((Path(__file__).parent / folder).iterdir())
  if path.name not in ("__init__.py", "data", "tasks")
]
install_import_hook(
  [".".join(room.parts) for room in ROOMS], "check_types.check_types"
)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
  """Frees what was compiled before it takes too many pieces of memory.

  A process may map only so many of them, each program has several, and XLA ends
  with a segmentation fault where there are no more. What is freed has to be
  traced and read from the cache again, so it stays as long as it may.
  """
  yield
  maps = Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
    jax.clear_caches()
