"""The notebook, run from its first cell to its last by a kernel of its own."""

from pathlib import Path

from child import devices
import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "tokenlora_jax.ipynb"
# configs/tiny.py with a tenth of its steps.
CONFIG = """
import dataclasses
import runpy

tiny = runpy.run_path({tiny!r})["config"]
optim = dataclasses.replace(tiny.optim, steps=6, warmup_steps=1)
config = dataclasses.replace(tiny, optim=optim, eval_every=3, save_every=3)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
  """What each cell showed: its text, and its outputs by kind."""
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  folder = tmp_path_factory.mktemp("notebook")
  config = folder / "config.py"
  config.write_text(CONFIG.format(tiny=str(ROOT / "configs/tiny.py")))
  client = nbclient.NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": NOTEBOOK.parent}}
  )
  # One device, as on a laptop.
  env = {"CONFIG": str(config), "WORKDIR": str(folder / "run")}
  client.execute(env=devices(1) | env)
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell, kind="text/plain"):
  found = []
  for output in cell.outputs:
    if output.output_type == "stream":
      found.append(output.text if kind == "text/plain" else "")
    else:
      found.append(output.data.get(kind, ""))
  return "".join(found)


def test_it_is_kept_without_what_it_showed():
  for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
    if cell.cell_type == "code":
      assert (cell.outputs, cell.execution_count) == ([], None)


def test_it_trains_mixes_shows_and_compares(cells):
  install, devices, train, mix, see, own, compare = cells
  assert not install.outputs
  assert shown(devices) == "1 x cpu\n"
  assert "step 6/6" in shown(train) and "bank: " in shown(train)
  for task in ("gsm8k", "arc_challenge", "codealpaca", "squad"):
    assert f"--- {task}: " in shown(mix)
  frame = shown(see, "text/html")
  assert frame.startswith("<iframe srcdoc=") and "arc_challenge" in frame
  assert len(shown(own)) > 0
  table = shown(compare)
  for arm in ("base", "adapter:squad", "uniform", "token:2", "sharp"):
    assert arm in table
  assert shown(compare, "image/png").count("iVBOR") == 2


def test_nothing_is_said_that_went_wrong(cells):
  for cell in cells:
    assert not [x for x in cell.outputs if x.get("name") == "stderr"]
