"""The reference of the scorers: lm-evaluation-harness's own tasks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.task import ConfigurableTask
import yaml


class _Loader(yaml.SafeLoader):
  """Reads the harness's files and leaves out the functions they name."""


_Loader.add_multi_constructor("!function", lambda *_: None)


@functools.cache
def harness_config(name: str) -> dict[str, Any]:
  """What the harness's file says of a task."""
  folder = Path(lm_eval.__file__).parent / "tasks" / name.partition("_")[0]
  config = yaml.load((folder / f"{name}.yaml").read_text(), _Loader)
  if include := config.pop("include", None):
    config = harness_config(include.removesuffix(".yaml")) | config
  return config


def harness_task(name: str, row: dict[str, Any]) -> ConfigurableTask:
  """A task of the harness that has this row alone."""
  rows = datasets.Dataset.from_list([row])
  splits = dict.fromkeys(("train", "validation", "test"), rows)
  config = {"metadata": None, "custom_dataset": lambda: splits}
  return ConfigurableTask(config=harness_config(name) | config)


def until(name: str, text: str) -> str:
  """A generated text as the harness's models return it."""
  for term in harness_config(name)["generation_kwargs"]["until"]:
    text = text.split(term)[0]
  return text


def harness_texts(
  name: str, text: str, row: dict[str, Any]
) -> dict[str, float]:
  """The harness's exact match of a text, after each of its filters."""
  task = harness_task(name, row)
  request = task.construct_requests(row, task.doc_to_text(row))
  request.resps = [until(name, text)]
  task._instances = [request]
  task.apply_filters()
  return {
    key: float(task.process_results(row, [found])["exact_match"])
    for key, found in request.filtered_resps.items()
  }
