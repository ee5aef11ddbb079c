"""The two programs end to end, on a tiny random base."""

import dataclasses
import functools
import io
import json
from pathlib import Path
import shutil
import sys

import numpy as np
import pytest

import infer
from tokenlora_jax.bank.bank import load_bank, save_bank
from tokenlora_jax.commands import wiring
from tokenlora_jax.commands.generate_args import Arguments
from tokenlora_jax.config import (
  BaseConfig,
  DecodeConfig,
  InputError,
  RouterConfig,
)
from tokenlora_jax.decoding import generate
from tokenlora_jax.evaluation.experiment.results import summarise
from tokenlora_jax.formats.load import Base, load_base
from tokenlora_jax.formats.tokenizers import load_tokenizer
from tokenlora_jax.model.lora import Adapters
from tokenlora_jax.report.trace import GateTrace
import train

TASKS = ("gsm8k", "codealpaca")
SETTINGS = (
  "--config", "configs/tiny.py", "--data.tasks", *TASKS, "--data.length", "128",
  "--data.train-rows", "8", "--data.eval-rows", "2", "--data.rows", "4",
  "--mesh.expert", "2", "--router.centroid-rows", "2", "--optim.steps", "3",
  "--optim.warmup-steps", "1", "--eval-every", "0",
  "--decode.max-new-tokens", "6", "--decode.refresh-every", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of three steps, with its bank."""
  workdir = tmp_path_factory.mktemp("runs") / "tiny"
  with pytest.MonkeyPatch.context() as patch:
    # The random base is drawn once a layout: drawing is what takes time.
    patch.setattr(Base, "weights", functools.cache(Base.weights))
    train.main([*SETTINGS, "--workdir", str(workdir)])
    yield workdir


@pytest.fixture
def run(workdir, capsys):
  """Runs infer.py in this process and returns what it prints."""

  def run(*argv, bank=workdir / "bank"):
    words = [word for word in argv if word in ("generate", "evaluate")]
    rest = [word for word in argv if word not in words]
    infer.main([*words, *SETTINGS, "--bank", str(bank), *rest])
    return capsys.readouterr().out

  return run


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_base_is_split_between_this_machines_devices(workdir):
  args = Arguments(
    base=BaseConfig("random:tiny", "float32"), bank=str(workdir / "bank")
  )
  base, _, _ = wiring.load(args)
  # Two kv heads, of eight devices.
  assert len(base.embedding[...].sharding.device_set) == 2


def test_examples_are_decoded_and_recorded(run, workdir, tmp_path):
  output, page, picture = (
    tmp_path / name for name in ("out.jsonl", "out.html", "out.png")
  )
  shown = run(
    "--examples", "1", "--output", str(output), "--html", str(page),
    "--png", str(picture),
  )  # fmt: skip
  found = records(output)
  assert len(found) == 2
  base = load_base("random:tiny", "float32")
  tokenizer = load_tokenizer("random:tiny")
  bank = load_bank(workdir / "bank", base)
  assert bank.experts["gsm8k"].template == "Question: {question}\n\nAnswer:"
  assert bank.experts["codealpaca"].task == "codealpaca"
  router = bank.router(RouterConfig(encoder="hidden"))
  assert found[0]["prompt"].startswith("Question:")
  for record in found:
    out = generate(
      base, [record["prompt"]], bank.adapters, router, DecodeConfig(6, 2),
      tokenizer,
    )  # fmt: skip
    count = out.lengths[0]
    assert record["tokens"] == out.tokens[0, :count].tolist()
    assert record["text"] == out.texts[0]
    np.testing.assert_allclose(record["gates"], out.gates[0, :count], atol=1e-6)
    np.testing.assert_allclose(np.sum(record["gates"], axis=1), 1, atol=1e-5)
    assert record["experts"] == list(TASKS)
    told = GateTrace.of(out.gates[0, :count])
    np.testing.assert_allclose(record["entropy"], told.entropy, atol=1e-6)
    assert record["switches"] == told.switches.tolist()
    np.testing.assert_allclose(record["shares"], told.shares, atol=1e-6)
    np.testing.assert_allclose(record["leads"], told.leads, atol=1e-6)
    assert record["router"]["encoder"] == "hidden"
    assert record["decode"]["refresh_every"] == 2
    # What streamed by is the text, but for a character cut in two.
    assert record["text"].rstrip("\ufffd") in shown
  assert "■ gsm8k  ■ codealpaca" in shown
  assert shown.count("mean gates:") == shown.count(" nats | ") == 2
  # The heat map is of the same texts.
  drawn = page.read_text("utf-8").partition('id="records">')[2]
  for record, one in zip(
    found, json.JSONDecoder().raw_decode(drawn)[0], strict=True
  ):
    assert one["prompt"] == record["prompt"]
    assert "".join(one["pieces"]) == record["text"].rstrip("\ufffd")
    np.testing.assert_allclose(one["gates"], record["gates"], atol=1e-4)
    assert one["experts"] == list(TASKS)
    assert one["facts"] == {
      "router": "centroid (hidden)", "gates refreshed": "every 2 tokens",
    }  # fmt: skip
  assert picture.read_bytes().startswith(b"\x89PNG")


def test_evaluate_agrees_with_training(run, workdir, tmp_path):
  output = tmp_path / "experiment"
  shown = run("evaluate", "--output", str(output))
  results = summarise(records(output / "rows.jsonl"))
  assert [arm.variant for arm in results.arms] == [
    "base", "own", "uniform", "prompt", "token:1", "token:2", "token:4",
  ]  # fmt: skip
  # Training's own held-out loss: the same rows through other code.
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  losses = {
    arm.variant: {
      task: results.figures[arm, "loss", task].own.value for task in TASKS
    }
    for arm in results.arms
  }
  for task in TASKS:
    own = losses["own"][task]
    assert own == pytest.approx(last[f"held_out/{task}"], abs=1e-4)
    assert own < losses["base"][task] - 0.02
    for variant, means in losses.items():
      assert 0 < means[task] < 7, variant
      assert f"{means[task]:.3f}" in shown
  assert losses["token:1"] != losses["prompt"]
  # The same command has nothing left to do, and says the same.
  kept = (output / "rows.jsonl").read_bytes()
  again = run("evaluate", "--output", str(output))
  assert "nats a token" in shown and "nats a token" not in again
  assert again.endswith(shown[shown.index("held-out loss") :])
  assert (output / "rows.jsonl").read_bytes() == kept
  refused(run, "evaluate", "--output", str(output), "--rows", "1", told="rows.")


def test_compare_shows_all_ways_side_by_side(run):
  shown = run("--examples", "1", "--compare")
  for name in (
    "base", *TASKS, "uniform", "router, at the prompt", "router, every 2",
  ):  # fmt: skip
    assert f"│ {name} " in shown


def test_prompts_come_from_flags_files_and_standard_input(
  run, tmp_path, monkeypatch
):
  def prompts(*argv):
    output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    run(*argv, "--router.name", "uniform", "--output", str(output))
    return [record["prompt"] for record in records(output)]

  file = tmp_path / "prompts.txt"
  file.write_text("Où?\n\n  two words\n", encoding="utf-8")
  flags = ["--prompt", "a = b", "--prompt", "[c]"]
  assert prompts(*flags) == ["a = b", "[c]"]
  monkeypatch.setattr(sys, "stdin", io.StringIO("one\n \ntwo\n"))
  assert prompts(*flags[:2], "--prompts-file", str(file)) == [
    "a = b", "Où?", "  two words",
  ]  # fmt: skip
  assert prompts() == ["one", "two"]


def test_stop_strings_and_half_characters_are_not_shown(run, tmp_path):
  output = tmp_path / "out.jsonl"
  one_hot = ["--router.name", "one-hot", "--router.expert", "gsm8k"]
  run("--prompt", "2 + 2 =", *one_hot, "--output", str(output))
  (free,) = records(output)
  whole = free["text"]
  stop = next(letter for letter in whole if letter != "\ufffd")
  stopped = tmp_path / "stopped.jsonl"
  shown = run(
    "--prompt", "2 + 2 =", *one_hot, "--decode.stop", stop,
    "--output", str(stopped),
  )  # fmt: skip
  (record,) = records(stopped)
  assert record["text"] == whole[: whole.index(stop)]
  made = len(record["tokens"])
  assert record["tokens"] == free["tokens"][:made]
  assert len(record["gates"]) == made < 6
  text = shown.partition("2 + 2 =")[2].partition("led:")[0]
  assert text.strip() == record["text"].rstrip("\ufffd").strip()


# -----------------------------------------------------------------------------
# Bad input.


def refused(run, *argv, told, **settings):
  with pytest.raises(InputError, match=told) as caught:
    run(*argv, **settings)
  assert "\n" not in str(caught.value)


def test_bad_input_is_one_line_and_overwrites_nothing(
  run, tmp_path, monkeypatch
):
  output = tmp_path / "out.jsonl"
  output.write_text("kept")
  empty = tmp_path / "empty.txt"
  empty.write_text("\n \n")
  latin = tmp_path / "latin.txt"
  latin.write_bytes(b"caf\xe9")
  one = ["--prompt", "a"]
  for argv, told in (
    ([*one, "--output", str(output)], r"out\.jsonl: exists"),
    (
      ["evaluate", "--output", str(output)],
      r"out\.jsonl: cannot be written to",
    ),
    ([*one, "--output", str(tmp_path / "no" / "o")], "there is no folder .*no"),
    (
      [*one, "--compare", "--output", "new"],
      "--output: cannot be used with --compare",
    ),
    (
      [*one, "--compare", "--png", "new"],
      "--png: cannot be used with --compare",
    ),
    ([*one, "--html", str(output)], r"--html .*out\.jsonl: exists"),
    ([*one, "--png", str(output)], r"--png .*out\.jsonl: exists"),
    (["--prompts-file", str(empty)], "--prompts-file.* holds no prompt"),
    (["--prompts-file", str(latin)], "--prompts-file.* cannot be read"),
    (["--prompts-file", "nowhere.txt"], r"nowhere\.txt"),
    (["--examples", "-1"], "--examples: -1 is not allowed"),
    (
      [*one, "--router.name", "one-hot", "--router.expert", "gsm9k"],
      "'gsm9k' is not one of gsm8k, codealpaca .*did you mean 'gsm8k'",
    ),
    ([*one, "--router.name", "unifrom"], "did you mean 'uniform'"),
    ([*one, "--router.encoder", "minilm"], "no centroids of 'minilm'"),
    ([*one, "--base", "random:tyni"], "'tyni' .*did you mean 'tiny'"),
    ([*one, "--base", "no/such/base"], "no/such/base"),
    (
      [*one, "--decode.max-new-tokens", "1023"],
      r"decode\.max-new-tokens: 1023",
    ),
    (
      ["evaluate", "--data.tasks", "gsm8k", "codealpca"],
      "did you mean 'codealpaca'",
    ),
    (["evaluate", "--data.tasks", "gsm8k", "squad"], "'squad' is not one of"),
  ):
    refused(run, *argv, told=told)
  monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
  refused(run, told="standard input: holds no prompt")
  with pytest.raises(InputError, match="'evaluat': is not a command; want"):
    infer.main(["evaluat", *SETTINGS])
  assert output.read_text() == "kept"
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "empty.txt", "latin.txt", "out.jsonl",
  ]  # fmt: skip


def test_bad_banks_are_one_line(run, workdir, tmp_path):
  one = ["--prompt", "a"]
  bank = tmp_path / "bank"
  refused(run, *one, bank=bank, told="holds no bank.json")

  shutil.copytree(workdir / "bank", bank)
  about = json.loads((bank / "bank.json").read_text())
  about["base"] = {"path": "his/base", "fingerprint": "random:other"}
  (bank / "bank.json").write_text(json.dumps(about))
  for argv in (one, ["evaluate"]):
    refused(run, *argv, bank=bank, told="trained on his/base.* --same-base")
  assert "tokens/s" in run(*one, "--same-base", bank=bank)
  shown = run("evaluate", "--same-base", "--variants", "uniform", bank=bank)
  assert "uniform" in shown

  shutil.rmtree(bank)
  shutil.copytree(workdir / "bank", bank)
  weights = bank / "gsm8k" / "adapter_model.safetensors"
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-100])
  damaged = "gsm8k/adapter_model.* was damaged or exchanged"
  refused(run, *one, bank=bank, told=damaged)
  refused(run, "evaluate", bank=bank, told=damaged)

  # All experts are of a base that is half as wide.
  whole = load_bank(workdir / "bank")
  layers = [
    {n: dataclasses.replace(x, a=x.a[..., :32]) for n, x in layer.items()}
    for layer in whole.adapters.layers
  ]
  narrow = Adapters(whole.adapters.names, tuple(layers))
  save_bank(bank, dataclasses.replace(whole, adapters=narrow))
  refused(run, *one, bank=bank, told=r"layer 0 q .*\[32, 64\].* another base\?")


def contents(folder: Path):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def test_training_refuses_before_it_writes(workdir, tmp_path):
  before = contents(workdir)
  fresh = str(tmp_path / "fresh")
  for argv, told in (
    (["--workdir", fresh, "--base", "random:tyni"], "did you mean 'tiny'"),
    (["--workdir", fresh, "--base", "no/such"], "no/such"),
    (["--workdir", fresh, "--data.tasks", "gsm8k", "sqad"], "mean 'squad'"),
    (["--workdir", fresh, "--mesh.data", "3"], "mesh"),
    (["--workdir", fresh, "--optim.learning-raet", "1"], "did you mean"),
    (
      ["--workdir", str(workdir), "--lora.rank", "4"],
      r"holds a run with lora\.rank 8 \(now 4\); choose another --workdir",
    ),
    (
      ["--workdir", str(workdir), "--no-resume"],
      "holds this run already; choose another",
    ),
  ):
    with pytest.raises(InputError, match=told) as caught:
      train.main([*SETTINGS, *argv])
    assert "\n" not in str(caught.value)
  assert not Path(fresh).exists()
  assert contents(workdir) == before
