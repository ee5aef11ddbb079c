"""Reports for people: gate statistics, terminal output and heat maps."""

from tokenlora_jax.report.colours import COLOURS
from tokenlora_jax.report.heatmap import HeatMap, gate_summary
from tokenlora_jax.report.page import heatmap_html
from tokenlora_jax.report.picture import heatmap_png
from tokenlora_jax.report.terminal import (
  legend,
  speed,
  summary,
  trace,
)

__all__ = [
  "COLOURS",
  "HeatMap",
  "gate_summary",
  "heatmap_html",
  "heatmap_png",
  "legend",
  "speed",
  "summary",
  "trace",
]
