"""DVC's commands in a process group, in a checkout of their own."""
