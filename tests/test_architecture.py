"""The house: who may import whom, and what every module owes its readers."""

import ast
import graphlib
from pathlib import Path
import re

ROOT = Path(__file__).parents[1]

# Room -> the rooms it may import besides itself, each listed before. Only the
# public names, `__init__`, reach all of them, and nothing inside imports these.
ARROWS = {
  "config": "",
  "files": "config",
  "model": "config",
  "report": "config",
  "parallel": "model config",
  "data": "parallel config",
  "encoders": "data model config",
  "formats": "encoders parallel model config",
  "mixing": "encoders model config",
  "bank": "mixing formats encoders model files config",
  "decoding": "mixing data model config",
  "training": "mixing data parallel model files config",
  "evaluation": "decoding mixing data report model files config",
  "plan": "training decoding mixing parallel model files config",
  "commands": (
    "plan evaluation training decoding bank mixing formats encoders data"
    " parallel report model files config"
  ),
  "lm_eval": "commands config",
}
ARROWS["__init__"] = " ".join(ARROWS)

# Foreign formats stay in their room, and torch in the tests.
ONLY_FORMATS = {"transformers", "gguf", "safetensors", "peft"}
# lm-eval is an extra; these modules are for those who have it.
FOR_LM_EVAL = {
  "tokenlora_jax.commands.lm_eval",
  "tokenlora_jax.commands.lm_eval_args",
  "tokenlora_jax.lm_eval",
}


def _name(file: Path) -> str:
  parts = file.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
  return [*module.split("."), "__init__"][1]


TREES = {
  file: ast.parse(file.read_text())
  for folder in (".", "tokenlora_jax/**", "tests/**", "benchmarks/**")
  for file in sorted(ROOT.glob(f"{folder}/*.py"))
}
OURS = {_name(f): f for f in TREES if f.is_relative_to(ROOT / "tokenlora_jax")}


def _imports(file: Path) -> set[str]:
  """Every module that a file imports, anywhere in it, by dotted name."""
  found = set()
  for node in ast.walk(TREES[file]):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{file}:{node.lineno}: write the import absolute"
      for name in (f"{node.module}.{alias.name}" for alias in node.names):
        found.add(name if name in OURS else node.module)
  return found


def _parents(module: str) -> set[str]:
  """Every package that holds a module, by dotted name."""
  parts = module.split(".")
  return {".".join(parts[:i]) for i in range(1, len(parts))}


def _packages(file: Path) -> set[str]:
  return {module.partition(".")[0] for module in _imports(file)}


def test_imports_follow_the_arrows():
  wrong = []
  for module, file in OURS.items():
    room = _room(module)
    assert room in ARROWS, f"{module}: give its room a line in ARROWS"
    for name in _imports(file):
      allowed = {room, *ARROWS[room].split()}
      if name.startswith("tokenlora_jax") and _room(name) not in allowed:
        wrong.append(f"{module} imports {name}")
  assert not wrong


def test_rooms_stand_in_the_order_of_their_arrows():
  rooms = list(ARROWS)
  for i, room in enumerate(rooms):
    assert set(ARROWS[room].split()) <= set(rooms[:i]), room


def test_the_page_of_the_architecture_draws_the_same_rooms():
  page = (ROOT / "docs" / "architecture.md").read_text()
  picture = page.partition("    tokenlora_jax/\n")[2].partition("    configs/")[
    0
  ]
  drawn = re.findall(r"^ {6}(\w+)(?:/|\.py) ", picture, re.MULTILINE)
  assert drawn == list(ARROWS)


def test_imports_have_no_circle_with_their_packages_counted():
  # To import a.b.c runs a/__init__ and a/b/__init__ first, where the importer
  # is not inside them.
  graph = {}
  for name, file in OURS.items():
    found = _imports(file) & set(OURS)
    found |= {parent for other in found for parent in _parents(other)}
    graph[name] = found - _parents(name) - {name}
  graphlib.TopologicalSorter(graph).prepare()


def test_foreign_formats_stay_in_their_room():
  for module, file in OURS.items():
    # A bank's own arrays are safetensors.
    ours = {"bank": {"safetensors"}}.get(_room(module), set())
    if _room(module) != "formats":
      assert not _packages(file) & (ONLY_FORMATS - ours), module


def test_lm_eval_is_needed_by_its_own_modules_alone():
  for file in [*OURS.values(), *ROOT.glob("*.py")]:
    if _name(file) not in FOR_LM_EVAL:
      assert "lm_eval" not in _packages(file), file
      assert not _imports(file) & FOR_LM_EVAL, file


def test_torch_never_runs():
  for file in [*OURS.values(), *ROOT.glob("*.py")]:
    assert "torch" not in _packages(file), file


def test_files_are_short_and_named_for_one_idea():
  for file, lines in ((f, len(f.read_text().splitlines())) for f in TREES):
    assert lines <= 450, f"{file.relative_to(ROOT)} has {lines} lines"
    assert "utils" not in file.relative_to(ROOT).with_suffix("").parts, file


def test_every_folder_is_a_package():
  # setuptools leaves a folder without __init__.py out of what it builds.
  folders = {file.parent for file in OURS.values()}
  assert not [f for f in folders if not (f / "__init__.py").exists()]


def test_every_public_name_has_a_docstring():
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  missing = [
    f"{module}.{getattr(node, 'name', '')}"
    for module, file in OURS.items()
    for node in [TREES[file], *TREES[file].body]
    if isinstance(node, (ast.Module, *kinds))
    and not getattr(node, "name", "").startswith("_")
    and ast.get_docstring(node) is None
  ]
  assert not missing
