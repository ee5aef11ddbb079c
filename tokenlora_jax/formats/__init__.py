"""Readers and writers of foreign files; only they import those libraries."""
