"""Runs `tokenlora_jax/commands/train.py`, which documents what it does."""

from tokenlora_jax.commands.train import main, script

__all__ = ["main"]

if __name__ == "__main__":
  script()
