"""Fixtures that several test modules share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
  """The folder of real rows and models that TOKENLORA_DATA names."""
  name = os.environ.get("TOKENLORA_DATA", "")
  if not name:
    pytest.fail("set TOKENLORA_DATA to the data folder (see CONTRIBUTING.md)")
  folder = Path(name)
  if not folder.is_dir():
    pytest.fail(f"TOKENLORA_DATA: {name!r} is not a folder")
  return folder


# Files that take longest, which two workers had better not leave to the end.
FIRST = (
  "test_processes.py", "test_notebook.py", "test_durable.py",
  "test_plan.py", "test_quantize.py", "test_sharding.py", "test_infer.py",
  "test_agreement.py", "test_train.py", "test_checkpoint.py", "test_load.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the longest files first; each keeps the order of its tests."""
  items.sort(key=lambda item: item.path.name not in FIRST)
