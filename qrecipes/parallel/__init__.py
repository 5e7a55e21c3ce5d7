"""Processes, sharding, compilation and activation checkpointing."""
