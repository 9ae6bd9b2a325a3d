"""GEdit-Bench: rows, questions to a judge, rules, verdict, report."""
