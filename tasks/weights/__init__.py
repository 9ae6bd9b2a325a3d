"""Weights by address, and how teachers that are brought along are put together."""
