"""Data: rows of the tasks, their tokens, and batches."""
