"""Rows of tasks become tokens, and tokens batches."""
