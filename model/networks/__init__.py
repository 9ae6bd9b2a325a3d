"""Whose weights: networks as fields, adapters, teachers, the student."""
