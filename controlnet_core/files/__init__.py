"""Weights files: what they hold, how they become networks, and how networks become files."""
