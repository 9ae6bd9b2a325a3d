"""MLflow: its server, runs, versions, files; and the ledger."""
