"""Evaluation of ways to mix on held-out rows."""
