"""How good: GenEval, GEdit-Bench, detector, judge, statistics, scorecard, report."""
