"""Typed runs, and the TOML they are written in."""
