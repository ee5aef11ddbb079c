"""lm-evaluation-harness's own command, in which `tokenlora_jax` is a model.

  python -m tokenlora_jax.lm_eval --model tokenlora_jax \\
    --model_args base=PATH,bank=FOLDER,router=centroid --tasks NAME

It takes what `lm_eval` takes. lm-eval 0.4 finds no models outside itself, so
that its plain command does not know ours.
"""

from collections.abc import Sequence

from tokenlora_jax.commands import cli
from tokenlora_jax.config import InputError


def main(argv: Sequence[str]) -> None:
  """Runs lm-eval's command, which reads the arguments itself."""
  del argv
  try:
    from lm_eval.__main__ import cli_evaluate

    # Makes the model known.
    import tokenlora_jax.commands.lm_eval  # noqa: F401
  except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "lm_eval":
      raise
    raise InputError(
      'lm-eval is not installed; pip install "lm-eval>=0.4.13"'
    ) from None
  cli_evaluate()


if __name__ == "__main__":
  cli.run(main)
