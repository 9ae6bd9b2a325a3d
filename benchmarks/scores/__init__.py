"""Scores of any benchmark: the scorecard, its statistics, the page and its figures."""
