"""Editing a bank: one part changes in one step, the others not at all."""

import dataclasses
import errno
import fcntl
import json
import os
from pathlib import Path
import subprocess
import sys

from banks import NAMES, contents, make_bank, make_base, refused, to_format_1
import jax
import numpy as np
import pytest

from tokenlora_jax.bank.arrays import Fitted
from tokenlora_jax.bank.bank import load_bank, save_bank
from tokenlora_jax.bank.edit import add_expert, drop_expert, save_fitted
from tokenlora_jax.bank.expert import Expert
from tokenlora_jax.bank.folder import drafting
from tokenlora_jax.config import InputError
from tokenlora_jax.formats.load import BaseIdentity
from tokenlora_jax.formats.peft import save_adapter
from tokenlora_jax.model.config import PRESETS
from tokenlora_jax.model.lora import Adapters, random_adapters

ROOT = Path(__file__).parents[1]
WIDTH = 64


class Encoder:
  """A text's vector is its length, everywhere."""

  def embed(self, texts):
    return np.outer([len(text) for text in texts], np.ones(WIDTH, np.float32))


@pytest.fixture(scope="module")
def base():
  return make_base()


@pytest.fixture
def folder(tmp_path):
  save_bank(tmp_path / "bank", make_bank())
  return tmp_path / "bank"


@pytest.fixture(scope="module")
def new(base, tmp_path_factory):
  """A PEFT folder of another rank."""
  folder = tmp_path_factory.mktemp("new") / "adapter"
  adapters = random_adapters(base, experts=1, rank=6, seed=5)
  save_adapter(adapters, 0, folder, base_name="some/base")
  return folder


def marks(folder):
  """What tells whether a file was written again."""
  return {
    str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
    for path in folder.rglob("*")
    if path.is_file()
  }


def of_expert(files, name):
  return {k: v for k, v in files.items() if k.startswith(f"{name}/")}


def test_an_expert_is_added_and_the_others_are_left_alone(folder, base, new):
  before, old = marks(folder), load_bank(folder)
  lacking = add_expert(
    folder, new, "delta", task="gsm8k", template="Q: {q}", base=base,
    texts=["ab", "abcd"], encoders={"hidden": Encoder()},
  )  # fmt: skip
  assert lacking == ()
  bank = load_bank(folder, base)
  assert bank.adapters.names == (*NAMES, "delta")
  assert bank.experts["delta"] == Expert("gsm8k", "Q: {q}")
  assert bank.experts["beta"] == old.experts["beta"]
  table = bank.centroids["hidden"]
  np.testing.assert_array_equal(table[:3], old.centroids["hidden"])
  assert table[3].tolist() == [3.0] * WIDTH
  for name in NAMES:
    jax.tree.map(
      lambda ours, theirs: np.testing.assert_array_equal(
        ours[:, : theirs.shape[1]] if ours.ndim == 3 else ours, theirs
      ),
      bank.adapters.select(name).layers,
      old.adapters.select(name).layers,
    )
    assert of_expert(marks(folder), name) == of_expert(before, name)
  config = json.loads((folder / "delta" / "adapter_config.json").read_text())
  assert (config["r"], config["base_model_name_or_path"]) == (6, "some/base")
  # The router fitted for three is there, and is refused.
  assert of_expert(marks(folder), "routers") == of_expert(before, "routers")
  with pytest.raises(InputError, match="fitted for alpha, beta, gamma, but"):
    bank.fitted_for("second")
  assert not list(folder.glob(".*"))


def test_a_dropped_expert_is_gone_and_the_others_are_left_alone(folder, base):
  before, old = marks(folder), load_bank(folder)
  drop_expert(folder, "beta")
  bank = load_bank(folder, base)
  assert bank.adapters.names == ("alpha", "gamma")
  np.testing.assert_array_equal(
    bank.centroids["hidden"], old.centroids["hidden"][[0, 2]]
  )
  assert not (folder / "beta").exists()
  for name in ("alpha", "gamma"):
    assert of_expert(marks(folder), name) == of_expert(before, name)
  with pytest.raises(InputError, match="'second' was fitted for alpha, beta"):
    bank.fitted_for("second")


def test_without_texts_a_centroid_is_said_to_be_missing(folder, base, new):
  assert add_expert(folder, new, "delta") == ("hidden",)
  bank = load_bank(folder, base)
  assert bank.lacking("hidden") == ("delta",)
  # It stays missing, and the others' stay, through further edits.
  drop_expert(folder, "alpha")
  again = load_bank(folder, base)
  assert again.lacking("hidden") == ("delta",)
  np.testing.assert_array_equal(
    again.centroids["hidden"], bank.centroids["hidden"][1:]
  )


def test_what_was_fitted_for_an_earlier_expert_of_a_name_is_removed(
  folder, base, new
):
  drop_expert(folder, "gamma")
  assert "second" in load_bank(folder).fitted
  add_expert(folder, new, "gamma")
  bank = load_bank(folder, base)
  assert bank.adapters.names == NAMES
  assert bank.fitted == {}
  assert not (folder / "routers").exists()


def test_adapters_in_memory_are_added_too(folder, base):
  two = random_adapters(base, experts=2, rank=2, seed=3)
  add_expert(folder, two.select("e1"), "delta", base=base)
  bank = load_bank(folder, base)
  np.testing.assert_array_equal(
    bank.adapters.select("delta").layers[0]["q"].a[0, :2],
    two.layers[0]["q"].a[1],
  )
  with pytest.raises(InputError, match=r"adapter: 2 experts .* want one"):
    add_expert(folder, two, "epsilon")


def test_a_fitted_router_is_put_in_and_replaced(folder, base):
  before = marks(folder)
  for step in (1, 2):
    fitted = Fitted({"step": step}, {"scores": np.full((3, 2), step)}, NAMES)
    save_fitted(folder, "kmeans", fitted)
    bank = load_bank(folder, base)
    assert bank.fitted_for("kmeans").settings == {"step": step}
    assert (
      bank.fitted_for("kmeans").arrays["scores"].tolist() == [[step] * 2] * 3
    )
  after = marks(folder)
  assert set(after) - set(before) == {"routers/kmeans.safetensors"}
  assert {k for k in before if before[k] != after[k]} == {"bank.json"}
  with pytest.raises(
    InputError, match="fitted kmeans: for alpha, but the bank"
  ):
    save_fitted(folder, "kmeans", Fitted({}, {}, ("alpha",)))


def test_format_1_becomes_2_with_an_edit(folder, base, new):
  to_format_1(folder)
  before = marks(folder)
  add_expert(folder, new, "delta", base=base)
  about = json.loads((folder / "bank.json").read_text())
  assert about["format"] == 2
  assert about["experts"][0]["ranks"] == [4]
  bank = load_bank(folder, base)
  assert bank.adapters.names == (*NAMES, "delta")
  for name in NAMES:
    assert of_expert(marks(folder), name) == of_expert(before, name)
  (folder / "alpha" / "adapter_model.safetensors").write_bytes(b"")
  refused(folder, base, "alpha", "was damaged or exchanged")


# -----------------------------------------------------------------------------
# Bad input.


def test_bad_edits_are_one_line_and_change_nothing(folder, base, new, tmp_path):
  narrow = jax.tree.map(
    lambda x: x[..., :32] if x.ndim == 3 else x,
    random_adapters(base, experts=1, rank=2).layers,
  )
  save_adapter(Adapters(("x",), narrow), "x", tmp_path / "narrow")
  down = [{"down": layer["q"]} for layer in narrow]
  save_adapter(Adapters(("x",), tuple(down)), "x", tmp_path / "down")
  named = random_adapters(base, experts=1, rank=2)
  save_adapter(named, 0, tmp_path / "named", base_name="his/base")
  (folder / "notes").mkdir()
  before, there = contents(folder), sorted(folder.iterdir())
  other = BaseIdentity(PRESETS["tiny"], "e" * 64)
  some = {"texts": ["a"], "encoders": {"hidden": Encoder()}}
  for edit, args, settings, told in (
    (add_expert, (new, "beta"), {}, "name: the bank has an expert 'beta' alr"),
    (add_expert, (new, "notes"), {}, "notes exists, and is no expert of the"),
    (add_expert, (new, "../x"), {}, r"name: '\.\./x' is no folder's name"),
    (add_expert, (new, "routers"), {}, "one that the bank itself needs"),
    (add_expert, (tmp_path / "narow", "x"), {}, "did you mean 'narrow"),
    (add_expert, (new, "x"), {"base": other}, "not on this base .eeeeeeeeeeee"),
    (
      add_expert, (tmp_path / "named", "x"), {},
      "its base is his/base, but the bank's is some/base; .* --same-base",
    ),
    (
      add_expert, (tmp_path / "narrow", "x"), {},
      r"narrow: layer 0 q is made for \[in, out\] = \[32, 32\], but the bank's"
      r" 'alpha' for \[64, 64\]",
    ),
    (
      add_expert, (tmp_path / "down", "x"), {"base": base},
      r"layer 0 down is made for \[in, out\] = \[32, 32\], but the base",
    ),
    (add_expert, (new, "x"), {"texts": ["a"]}, "texts: 1 with 0 encoders"),
    (
      add_expert, (new, "x"), some | {"encoders": {"hiden": Encoder()}},
      "encoders: 'hiden' is not one of hidden .did you mean",
    ),
    (drop_expert, ("bta",), {}, "name: 'bta' is not one of .*mean 'beta'"),
  ):  # fmt: skip
    with pytest.raises(InputError, match=told) as caught:
      edit(folder, *args, **settings)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert sorted(folder.iterdir()) == there
  add_expert(folder, tmp_path / "named", "x", same_base=True)
  for name in NAMES:
    drop_expert(folder, name)
  with pytest.raises(InputError, match="'x' is the bank's only expert"):
    drop_expert(folder, "x")
  for edit, args in ((add_expert, (new, "x")), (drop_expert, ("x",))):
    with pytest.raises(InputError, match=r"holds no bank\.json"):
      edit(tmp_path / "named", *args)


def test_a_second_writer_waits(folder):
  place = os.open(folder, os.O_RDONLY)
  fcntl.flock(place, fcntl.LOCK_EX)
  with pytest.raises(InputError, match="another process writes to this bank"):
    drop_expert(folder, "beta")
  os.close(place)
  drop_expert(folder, "beta")


def test_a_disk_without_locks_gets_a_warning(folder, monkeypatch, caplog):
  def flock(file, how):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", flock)
  drop_expert(folder, "beta")
  assert caplog.messages == [
    f"{folder}: its disk has no locks (No locks available); let no other process"
    " write to this bank"
  ]
  assert load_bank(folder).adapters.names == ("alpha", "gamma")


# -----------------------------------------------------------------------------
# Kills.

# Forks a process for each moment at which an edit touches the disk, and kills
# it there, before it does: no `finally` runs, as with SIGKILL.
KILLS = f"""
import os, pathlib, shutil, sys, warnings
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
warnings.simplefilter("ignore")
import numpy as np
from tokenlora_jax.bank import arrays as bank_arrays
from tokenlora_jax.bank import bank
from tokenlora_jax.bank import edit as bank_edit
from tokenlora_jax.model.lora import Adapters, Lora

root, new = map(pathlib.Path, sys.argv[1:])
again = bank_arrays.Fitted(
  {{"top": 3}}, {{"order": np.zeros(3)}}, ("alpha", "beta", "gamma")
)
# In NumPy: a process that JAX has started in cannot be forked.
ones = np.ones((2, 3, 64), np.float32)
others = Adapters(
  ("alpha", "delta"), ({{"q": Lora(ones, ones, ones[:, 0, 0])}},)
)
table = np.zeros((2, 64), np.float32)
other = bank.Bank(others, "some/base", "f" * 64, {{"hidden": table}})
edits = {{
  "add": lambda folder: bank_edit.add_expert(folder, new, "delta"),
  "drop": lambda folder: bank_edit.drop_expert(folder, "beta"),
  "fit": lambda folder: bank_edit.save_fitted(folder, "second", again),
  "save": lambda folder: bank.save_bank(folder, other),
}}

def kill_at(moment):
  left = [moment]
  def hook(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
      left[0] -= 1
      if left[0] < 0:
        os._exit(9)
  sys.addaudithook(hook)

for name, edit in edits.items():
  moment, status = 0, 9
  while status:
    folder = root / name / str(moment)
    shutil.copytree(root / "bank", folder)
    child = os.fork()
    if not child:
      try:
        kill_at(moment)
        edit(folder)
        os._exit(0)
      except BaseException as error:
        print(name, moment, repr(error), flush=True)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), (name, moment)
    moment += 1
"""


@pytest.fixture(scope="module")
def killed(new, tmp_path_factory):
  """Banks whose edit was killed, by edit; of each the last was not."""
  root = tmp_path_factory.mktemp("kills")
  save_bank(root / "bank", make_bank())
  command = [sys.executable, "-c", KILLS, str(root), str(new)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  return root


def order(path):
  return int(path.name)


@pytest.mark.parametrize("edit", ["add", "drop", "fit", "save"])
def test_a_killed_edit_leaves_the_old_bank_or_the_new_one(killed, edit):
  def state(bank):
    tops = [fitted.settings["top"] for fitted in bank.fitted.values()]
    rank = bank.adapters.select("alpha").layers[0]["q"].a[0].any(axis=1).sum()
    return bank.adapters.names, tops, len(bank.centroids["hidden"]), int(rank)

  old = (NAMES, [2], 3, 4)
  new = {
    "add": ((*NAMES, "delta"), [2], 4, 4),
    "drop": (("alpha", "gamma"), [2], 2, 4),
    "fit": (NAMES, [3], 3, 4),
    "save": (("alpha", "delta"), [], 2, 3),
  }[edit]
  before = contents(killed / "bank")
  folders = sorted((killed / edit).iterdir(), key=order)
  states = [state(load_bank(folder, make_base())) for folder in folders]
  # Old ones, then new ones, and some of both: the edit is decided once.
  decided = states.index(new)
  assert states == [old] * decided + [new] * (len(states) - decided)
  assert 3 <= decided <= len(states) - 4
  left = 0
  for folder, found in zip(folders, states, strict=True):
    left += bool(list(folder.glob(".*")))
    with drafting(folder):  # Any writer finishes it, or takes it back.
      pass
    assert state(load_bank(folder, make_base())) == found
    after = contents(folder)
    assert not [name for name in after if name.startswith(".")]
    assert "moving" not in json.loads(after["bank.json"])
    for name in set(NAMES) & set(found[0]) if found[3] == 4 else ():
      assert of_expert(after, name) == of_expert(before, name)
    there = {path.name for path in folder.iterdir() if path.is_dir()}
    assert there == {*found[0], *(["routers"] if found[1] else [])}
  assert left > len(states) / 2


def test_a_killed_save_is_finished_or_taken_back(tmp_path):
  """A folder that a killed writer left without a bank takes a new one."""
  scratch = tmp_path / "bank" / ".new-abc"
  scratch.mkdir(parents=True)
  (scratch / "x").write_text("half")
  save_bank(tmp_path / "bank", make_bank())
  assert load_bank(tmp_path / "bank").adapters.names == NAMES
  assert not list((tmp_path / "bank").glob(".*"))
  # And a whole bank in another's place is read from where it lies.
  other = dataclasses.replace(
    make_bank(), adapters=random_adapters(make_base(), experts=3, rank=2)
  )
  bank = dataclasses.replace(
    other, adapters=Adapters(NAMES, other.adapters.layers)
  )
  half = tmp_path / "half"
  save_bank(half, bank)
  whole = contents(half)
  moved = half / ".new-xyz"
  moved.mkdir()
  for name in ("alpha", "centroids.safetensors", "routers"):
    (half / name).rename(moved / name)
  old = tmp_path / "bank" / "alpha"
  old.rename(half / "alpha")
  about = json.loads((half / "bank.json").read_text())
  about["moving"] = {"scratch": ".new-xyz", "gone": []}
  (half / "bank.json").write_text(json.dumps(about))
  assert load_bank(half).adapters.layers[0]["q"].a.shape == (3, 2, 64)
  with drafting(half):
    pass
  assert contents(half) == whole
