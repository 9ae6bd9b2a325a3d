"""What distill and absorb share: the run, its states, its metrics, several processes."""
