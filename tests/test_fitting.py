"""Fitting gates on a tiny base whose adapters differ."""

import dataclasses
import functools
import io
import string

from banks import edit_about
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
import tiny
from tiny import TWO, Tokenizer, make_base, make_config, one_device

from tokenlora_jax.bank.bank import Bank, load_bank, save_bank
from tokenlora_jax.bank.expert import Expert
from tokenlora_jax.commands import training
from tokenlora_jax.config import (
  DataConfig,
  InputError,
  MeshConfig,
  RouterConfig,
)
from tokenlora_jax.data.batches import batches
from tokenlora_jax.data.examples import tokenize
from tokenlora_jax.data.rows import Row, load_rows
from tokenlora_jax.formats.load import Base, load_base
from tokenlora_jax.mixing.mixture import forward
from tokenlora_jax.mixing.routers import make_router
from tokenlora_jax.mixing.shaping import keep_top
from tokenlora_jax.model.llama import Llama
from tokenlora_jax.model.lora import Adapters, random_adapters
from tokenlora_jax.parallel.sharding import make_mesh
from tokenlora_jax.training.routers import Work, get_fit
from tokenlora_jax.training.routers.descent import descend
from tokenlora_jax.training.routers.embeddings import fit_embeddings
from tokenlora_jax.training.routers.switch import balance_loss, with_cost
import train

ROWS, PROMPT, ANSWER = 12, 6, 6
FITTED = ("lora-flow", "phatgoose", "switch", "x-lora")


@pytest.fixture(scope="module")
def adapters() -> Adapters:
  drawn = random_adapters(make_base(), experts=2, rank=4)
  return Adapters(TWO, drawn.layers)


@pytest.fixture(scope="module")
def rows(adapters) -> dict[str, list[Row]]:
  """Prompts of letters of an expert's own, and what it alone would answer."""
  made = {}
  for i, task in enumerate(adapters.names):
    own = np.arange(2, 24) if i == 0 else np.arange(24, 48)
    prompts = np.random.default_rng(i).choice(own, (ROWS, PROMPT))
    text = np.concatenate([np.zeros((ROWS, 1), int), prompts], axis=1)
    gates = np.tile(np.eye(2)[i], (ROWS, 1))
    size = text.shape[1]
    text = np.pad(text, ((0, 0), (0, ANSWER)))
    for n in range(size, size + ANSWER):
      logits = forward(make_base(), text, adapters, gates)[:, n - 1]
      text[:, n] = 2 + np.argmax(logits[:, 2:], axis=-1)
    letters = [
      "".join(string.ascii_letters[token - 2] for token in row[1:])
      for row in text
    ]
    made[task] = [
      Row(row[:PROMPT], row[PROMPT:], f"{task}:{i}")
      for i, row in enumerate(letters)
    ]
  return made


def unstacked(base: Llama) -> Llama:
  """The same base with its layers in a list."""

  def make(name, shape):
    first, *rest = name.split(".")
    if first != "layers":
      return getattr(base, first)[...]
    place, *path = rest
    owner = functools.reduce(getattr, path, base.layers)
    return owner[...][int(place)]

  return Llama(base.config, make)


def make_work(adapters, rows, steps=20, mesh=None, console=None, **settings):
  mesh = mesh or one_device()
  config = make_config(
    tasks=adapters.names, steps=steps, optim={"learning_rate": 0.03}, **settings
  )
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return Work(
    config,
    jax.device_put(make_base(), everywhere),
    adapters,
    mesh,
    batches(rows, Tokenizer(), config.data, mesh),
    [rows[task] for task in adapters.names],
    lambda: None,
    console or Console(file=io.StringIO()),
  )


@pytest.fixture(scope="module")
def fits(adapters, rows):
  """Each router's fitted arrays and what was told, fitted once."""

  @functools.cache
  def fit(name):
    console = Console(file=io.StringIO(), width=200)
    work = make_work(adapters, rows, console=console)
    before = tiny.leaves((work.base, adapters.layers))
    settings, arrays = get_fit(name)(work)
    after = tiny.leaves((work.base, adapters.layers))
    for key, leaf in before.items():
      np.testing.assert_array_equal(leaf, after[key], key)
    return settings, arrays, console.file.getvalue()

  return fit


def loss(base, adapters, rows, **mixing) -> float:
  """The mean over experts of nats a target token, read as in decoding."""
  means = []
  for task in adapters.names:
    examples = [
      tokenize(row, Tokenizer(), make_config().data) for row in rows[task]
    ]
    tokens = np.stack([example.tokens for example in examples])
    logits = forward(base, tokens, adapters, **mixing)
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    told = np.take_along_axis(np.array(log_probs), tokens[:, 1:, None], -1)
    means.append(-told[:, PROMPT:].mean())
  return float(np.mean(means))


@pytest.mark.parametrize("name", FITTED)
def test_a_fit_lowers_the_loss_and_leaves_all_else_alone(
  adapters, rows, fits, name
):
  settings, arrays, told = fits(name)
  assert settings == {}
  line = next(x for x in told.splitlines() if x.startswith(f"{name}: "))
  first, last = (float(x) for x in line.split()[1:4:2])
  assert last < first - 0.05
  assert all(np.isfinite(x).all() and x.any() for x in arrays.values())
  # As decoding has it, where PHATGOOSE for one was fitted to something else.
  base = unstacked(make_base())
  router = make_router(name, adapters=adapters, arrays=arrays)
  halves = loss(base, adapters, rows, gates=np.full((ROWS, 2), 0.5))
  assert loss(base, adapters, rows, router=router) < halves - 0.05


def test_phatgooses_experts_learn_alone(adapters, rows, fits):
  """What is learned for one does not depend on who else is fitted."""
  together = fits("phatgoose")[1]
  task = adapters.names[1]
  work = make_work(adapters.select(task), {task: rows[task]})
  _, alone = get_fit("phatgoose")(work)
  for name, vectors in alone.items():
    np.testing.assert_allclose(vectors[0], together[name][1], atol=1e-4)


def test_a_mesh_and_parts_give_the_same_fit(adapters, rows):
  """Rows over two devices and in two parts are one device's rows at once."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=1), devices=jax.devices()[:2])
  fit = get_fit("x-lora")
  _, one = fit(make_work(adapters, rows, steps=3))
  _, split = fit(make_work(adapters, rows, steps=3, mesh=mesh, accumulate=2))
  for key, array in one.items():
    np.testing.assert_allclose(split[key], array, atol=1e-4)


def test_balance_is_that_of_fedus_by_hand():
  soft = np.array([[[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]])
  real = np.array([[True, True, True]])
  shares, means = [2 / 3, 1 / 3, 0], soft[0].mean(axis=0)
  want = 3 * sum(f * p for f, p in zip(shares, means, strict=True))
  kept = keep_top(jnp.asarray(soft), 1)
  np.testing.assert_allclose(balance_loss(soft, kept, real), want, rtol=1e-6)
  # Padding does not count.
  real[0, 1] = False
  want = 3 * soft[0, [0, 2]].mean(axis=0)[0]
  np.testing.assert_allclose(balance_loss(soft, kept, real), want, rtol=1e-6)


def test_a_cost_inside_a_scan_is_a_part_of_the_gradient():
  def through(x, weight):
    def layer(x, w):
      return with_cost(x * w, 0.5 * w**2), None

    return jax.lax.scan(layer, x, weight)[0]

  def plain(x, weight):
    return x * weight[0] * weight[1] + 0.5 * jnp.sum(weight**2)

  weight = jnp.array([2.0, 3.0])
  assert through(1.5, weight) == 9
  np.testing.assert_allclose(
    jax.grad(through, 1)(1.5, weight), jax.grad(plain, 1)(1.5, weight)
  )


@pytest.mark.parametrize(
  ("first", "told"),
  [
    (0.0, r"step 1: the loss of gsm8k is nan on rows \[\d+, \d+, \d+, \d+\]"),
    (1.0, r"step 1: the gradient norm is nan on rows \{'gsm8k': \["),
  ],
)
def test_what_is_no_number_stops_a_fit(adapters, rows, first, told):
  def objective(params, step):
    # The root's gradient at 0 is infinite, and 0 times it no number.
    x = 0 * jnp.sqrt(params["q"]["x"] * 0) + (jnp.nan if first == 0 else 1)
    return x.mean(), jnp.ones(2) if first else jnp.full(2, jnp.nan)

  work = make_work(adapters, rows, steps=3)
  with pytest.raises(FloatingPointError, match=told):
    descend(work, "any", {"q": {"x": jnp.zeros((1, 2))}}, objective)


def test_embeddings_are_fitted_by_a_function_of_vectors(adapters, rows):
  class Counts:
    def embed(self, texts):
      return np.array([[len(text), text.count("a")] for text in texts], float)

  work = make_work(adapters, rows, router=RouterConfig(encoder="hidden"))
  work = dataclasses.replace(work, encoder=Counts)
  fit = fit_embeddings(
    lambda vectors, _: {"means": np.stack([v.mean(axis=0) for v in vectors])}
  )
  settings, arrays = fit(work)
  assert settings == {"encoder": "hidden"}
  whole = PROMPT + ANSWER
  assert arrays["means"][:, 0].tolist() == [whole, whole]
  fit = fit_embeddings(
    lambda vectors, _: {"lengths": np.stack([v[:2, 0] for v in vectors])},
    lambda row: [row.prompt, row.text],
  )
  assert fit(work)[1]["lengths"].tolist() == [[PROMPT, whole]] * 2


def test_a_name_without_a_fit_is_told_in_one_line():
  with pytest.raises(InputError, match=r"'x-lore' .*did you mean 'x-lora'\?"):
    train.main(["--config", "configs/tiny.py", "--fit-router", "x-lore"])
  with pytest.raises(InputError, match="--bank: needs --fit-router"):
    train.main(["--config", "configs/tiny.py", "--bank", "runs/tiny/bank"])


SETTINGS = (
  "--config", "configs/tiny.py", "--data.tasks", "codealpaca", "gsm8k",
  "--data.length", "128", "--data.train-rows", "8", "--data.rows", "4",
  "--mesh.expert", "2", "--optim.steps", "2", "--optim.warmup-steps", "0",
)  # fmt: skip


def test_the_program_fits_a_router_and_saves_it(tmp_path, capsys, monkeypatch):
  base = load_base("random:tiny", "float32")
  layers = random_adapters(base, experts=2, rank=2).layers
  adapters = Adapters(("gsm8k", "codealpaca"), layers)
  folder = tmp_path / "bank"
  centroids = {"hidden": np.ones((2, 64), np.float32)}
  save_bank(folder, Bank(adapters, "random:tiny", base.fingerprint, centroids))
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

  argv = [*SETTINGS, "--bank", str(folder), "--fit-router", "lora-flow"]
  monkeypatch.setattr(Base, "weights", functools.cache(Base.weights))
  train.main(argv)
  told = capsys.readouterr().out
  assert "lora-flow: fitted to gsm8k, codealpaca, in " in told
  # Of the bank that was there, only what names its files is another.
  for file, content in before.items():
    assert (file.read_bytes() == content) == (file.name != "bank.json")
  bank = load_bank(folder, base)
  router = bank.router(RouterConfig("lora-flow"))
  logits = forward(base, [[1, 2, 3]], adapters, router=router)
  assert np.isfinite(logits).all()
  assert bank.fitted["lora-flow"].arrays["layers.1.v.weights"].any()

  with pytest.raises(
    InputError, match=r"data\.tasks: gsm8k, squad is .* codealpaca"
  ):
    train.main([*argv, "--data.tasks", "gsm8k", "squad"])


def test_an_expert_of_another_name_reads_its_tasks_rows(tmp_path, monkeypatch):
  """Three experts of two tasks, two of which are not named for theirs."""
  base = load_base("random:tiny", "float32")
  names = ("maths", "codealpaca", "gsm8k-2")
  layers = random_adapters(base, experts=3, rank=2).layers
  about = {"maths": Expert("gsm8k"), "gsm8k-2": Expert("gsm8k")}
  folder = tmp_path / "bank"
  bank = Bank(
    Adapters(names, layers), "random:tiny", base.fingerprint,
    {"hidden": np.ones((3, 64), np.float32)}, about,
  )  # fmt: skip
  save_bank(folder, bank)
  seen = []

  def fit(work):
    batch = next(iter(work.batches))
    seen.extend([work.config.data.tasks, work.rows, batch["tokens"]])
    return {}, {"weights": np.ones(3)}

  monkeypatch.setattr(training, "get_fit", lambda name: fit)
  monkeypatch.setattr(Base, "weights", functools.cache(Base.weights))
  argv = [*SETTINGS, "--bank", str(folder), "--fit-router", "lora-flow"]
  argv += ["--data.rows", "8", "--mesh.expert", "1"]
  train.main(argv)
  experts, rows, tokens = seen
  assert experts == names == load_bank(folder).fitted["lora-flow"].experts
  data = DataConfig(source="builtin", train_rows=8)
  for some, task in zip(rows, ("gsm8k", "codealpaca", "gsm8k"), strict=True):
    known = {row.text for row in load_rows(data, task, "train")}
    assert some and {row.text for row in some} <= known
  assert tokens.shape[0] == 3

  # What is not known here is said, and nothing is written.
  before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
  with pytest.raises(InputError, match=r"tasks .* experts, gsm8k, codealpaca"):
    train.main([*argv, "--data.tasks", "maths", "codealpaca", "gsm8k-2"])
  for task, told in (
    ("sums", "of task 'sums', which"),
    ("", "of task 'maths'"),
  ):
    edit_about(folder, "experts", 0, task=task)
    with pytest.raises(InputError, match=rf"expert 'maths' is {told}"):
      train.main(argv)
  edit_about(folder, "experts", 0, task="gsm8k")
  after = {p: p.read_bytes() for p in before if p.name != "bank.json"}
  assert after.items() <= before.items()
