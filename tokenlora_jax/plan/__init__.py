"""Estimates memory and time of a run on absent hardware by compiling for it."""
