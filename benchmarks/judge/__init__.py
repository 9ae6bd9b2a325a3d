"""Who grades edits: the wording of the question, the protocol of the reply, endpoints and local models."""
