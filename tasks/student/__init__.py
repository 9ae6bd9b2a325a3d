"""A student in use: opened, sampled, exported."""
