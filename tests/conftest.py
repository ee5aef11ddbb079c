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
