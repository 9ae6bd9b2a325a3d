"""DVC's commands: each in its process group, a worker's run in its checkout."""
