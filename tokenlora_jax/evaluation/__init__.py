"""Evaluation on held-out rows: losses, likelihoods, scores, experiments."""
