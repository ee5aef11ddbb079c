"""An experiment: compares several ways to mix on the same held-out rows.

An *arm* is one way to mix; a *cell* is an arm on a task. Each row of each cell
is one line of FOLDER/rows.jsonl, and all results are computed from these lines.
"""
