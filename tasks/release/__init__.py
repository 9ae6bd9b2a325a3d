"""May this version go to production: provenance, gate, card, submission, review, decisions, publication."""
