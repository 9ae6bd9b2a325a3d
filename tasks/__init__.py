"""The stages (files to files), the Prefect tasks that run them, tracking, registry and gate."""
