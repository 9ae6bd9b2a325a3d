"""When and who: Prefect flows and their deployments. No torch."""
