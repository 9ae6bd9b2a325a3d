"""When and who: Prefect flows and their deployments. No torch."""

from tasks.environment import prepare

prepare()  # before Prefect reads its settings
