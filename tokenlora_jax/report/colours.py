"""The experts' colours, and contrast between colours."""

from __future__ import annotations

import numpy as np

# Colours that remain distinct under colour blindness (Okabe and Ito, 2008).
COLOURS = (
  "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442",
)  # fmt: skip

# Opacity of a tint at a lead of 0 and at a lead of 1.
FAINTEST, STRONGEST = 0.16, 0.72


def colour(expert: int) -> str:
  """Returns the colour of an expert; colours repeat after the seventh.

  Args:
    expert: the expert's index.

  Returns:
    The colour as #rrggbb.

  Example:
    >>> colour(0) == colour(7), colour(0) == colour(1)
    (True, False)
  """
  return COLOURS[expert % len(COLOURS)]


def ink(paper: str) -> str:
  """Returns black or white, whichever has more contrast to a background.

  Args:
    paper: the background, #rrggbb.

  Example:
    >>> ink("#0072b2"), ink("#f0e442")
    ('#ffffff', '#000000')
  """
  return max("#000000", "#ffffff", key=lambda text: contrast(text, paper))


def contrast(one: str, other: str) -> float:
  """Returns the contrast of two colours, from 1 to 21 (W3C, 2023, WCAG 2.2).

  Args:
    one: a colour, #rrggbb.
    other: another colour, #rrggbb.

  Example:
    >>> contrast("#000000", "#ffffff")
    21.0
  """
  dark, light = sorted(map(_luminance, (one, other)))
  return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
  values = np.array(channels(colour)) / 255
  linear = np.where(
    values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
  )
  return float(linear @ [0.2126, 0.7152, 0.0722])


def channels(colour: str) -> tuple[int, ...]:
  """Returns a colour's red, green and blue, from 0 to 255.

  Args:
    colour: #rrggbb.

  Example:
    >>> channels("#0072b2")
    (0, 114, 178)
  """
  return tuple(bytes.fromhex(colour[1:]))


def tint(strength: float) -> float:
  """Returns the opacity of the leading expert's colour behind a token.

  Args:
    strength: the lead over the next expert, 0 to 1.

  Example:
    >>> tint(0), tint(1)
    (0.16, 0.72)
  """
  return FAINTEST + (STRONGEST - FAINTEST) * strength


def mix(colour: str, paper: str, opacity: float) -> str:
  """Returns a colour laid over another with some opacity.

  Args:
    colour: the upper colour, #rrggbb.
    paper: the lower colour, #rrggbb.
    opacity: of the upper colour, 0 to 1.

  Example:
    >>> mix("#000000", "#ffffff", 0.2)
    '#cccccc'
  """
  pairs = zip(channels(colour), channels(paper), strict=True)
  return "#" + "".join(
    f"{round(opacity * one + (1 - opacity) * other):02x}"
    for one, other in pairs
  )
