"""What is asked before and after a run: preflight, plan, doctor, lineage, rescore."""
