"""GenEval: prompts, images, detector, colours, rules, verdict, report."""
