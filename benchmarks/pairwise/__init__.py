"""Which of two models does better on the same prompts, as a judge prefers their images."""
