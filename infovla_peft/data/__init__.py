"""Demonstrations on their way into a batch."""
