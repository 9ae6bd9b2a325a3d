"""Velocity fields, one file a field."""
