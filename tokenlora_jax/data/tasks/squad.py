"""SQuAD v1.1: answers that are spans (Rajpurkar et al., 2016, 1606.05250)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
import random
from typing import Any, ClassVar

from tokenlora_jax.config import InputError
from tokenlora_jax.data.tasks.task import (
  Task,
  items,
  read_json,
  read_lines,
  text,
  texts,
)

_PLACES = (
  "Alder Bay", "Brindle", "Corvan", "Dunmere", "Eastholm", "Farrow", "Glenloch",
  "Harwick", "Ilmora", "Jarrow Hill", "Kestrel Point", "Lindale", "Marwen",
  "Northgate", "Orley", "Penfold", "Quarry Town", "Redmoor", "Stanwick",
)  # fmt: skip
_PEOPLE = (
  "Anna Kessler", "Bruno Vidal", "Clara Osei", "David Lindqvist", "Emma Sato",
  "Felix Moreau", "Grace Adeyemi", "Henrik Dahl", "Irene Costa", "Jonas Weber",
  "Karin Novak", "Louis Tran", "Maria Petrov", "Nadia Rahman", "Otto Brandt",
)  # fmt: skip
_BUILDINGS = {
  "library": "books", "museum": "paintings", "theatre": "seats",
  "hotel": "rooms", "school": "desks", "garden": "trees", "harbour": "boats",
  "observatory": "telescopes", "station": "platforms", "archive": "letters",
}  # fmt: skip


class Squad(Task):
  """Context and question -> the words of the context that answer it."""

  name = "squad"
  template = "Context:\n{context}\n\nQuestion: {question}\n\nAnswer:"
  suffix = "json"
  hub = ("rajpurkar/squad",)
  tfds = "squad/v1.1"
  splits: ClassVar[Mapping[str, str]] = {
    "train": "train",
    "test": "validation",
  }

  def prompt(self, row: Any) -> str:
    context, question = text(row, "context"), text(row, "question")
    return self.template.format(context=context, question=question)

  def answer(self, row: Any) -> str:
    if not items(row, "answers", "text"):
      raise InputError(
        "field 'answers.text' is empty: the question has no answer, as many of"
        " SQuAD v2 have none"
      )
    return f" {texts(row, 'answers', 'text')[0].lstrip()}"

  def read(self, path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (path in the document, row) of the nested format, or flat rows.

    In the nested format articles hold paragraphs, and each paragraph a context
    and questions. The hub's flat rows may be JSON lines or one JSON list.
    """
    if self.in_lines(path):
      yield from read_lines(path)
      return
    document = read_json(path)
    if isinstance(document, list) and document:
      yield from super().read(path)
      return
    articles = _children(document, "data", str(path))
    for a, article in enumerate(articles):
      place = f"data[{a}]"
      paragraphs = _children(article, "paragraphs", f"{path}:{place}")
      for p, paragraph in enumerate(paragraphs):
        place = f"data[{a}].paragraphs[{p}]"
        questions = _children(paragraph, "qas", f"{path}:{place}")
        for q, question in enumerate(questions):
          yield f"{place}.qas[{q}]", _flat(paragraph, question)

  def invent(self, rng: random.Random) -> dict[str, Any]:
    building, contents = rng.choice(sorted(_BUILDINGS.items()))
    place, person = rng.choice(_PLACES), rng.choice(_PEOPLE)
    year, count = str(rng.randint(1700, 1999)), str(rng.randint(12, 980))
    context = rng.choice(
      (
        "The {building} of {place} was designed by {person}. It opened in "
        "{year} and has {count} {contents}.",
        "In {year}, {person} founded the {building} of {place}. It now holds "
        "{count} {contents}.",
        "{place} is known for its {building}, built by {person} in {year}. "
        "Visitors can see {count} {contents}.",
      )
    ).format(
      building=building, place=place, person=person,
      year=year, count=count, contents=contents,
    )  # fmt: skip
    question, answer = rng.choice(
      (
        (f"Who made the {building}?", person),
        (f"What year is the {building} from?", year),
        (f"How many {contents} does the {building} have?", count),
        (f"Where is the {building}?", place),
      )
    )
    return {
      "id": f"builtin-{rng.getrandbits(32):08x}",
      "title": place,
      "context": context,
      "question": question,
      "answers": {"text": [answer], "answer_start": [context.rindex(answer)]},
    }


def _children(parent: Any, key: str, place: str) -> list[Any]:
  try:
    return items(parent, key)
  except InputError as error:
    raise InputError(f"{place}: {error}") from None


def _flat(paragraph: dict[str, Any], question: Any) -> Any:
  """Converts a question to the hub's schema.

  A question that breaks the schema is kept, so that the check can name the
  fault.
  """
  if not isinstance(question, dict):
    return question
  row = dict(question)
  if "context" in paragraph:
    row["context"] = paragraph["context"]
  if isinstance(answers := question.get("answers"), list):
    row["answers"] = {
      key: [a.get(key) if isinstance(a, dict) else a for a in answers]
      for key in ("text", "answer_start")
    }
  return row
