"""Finished models on disk."""
