"""Prefect flows: thin orchestration, one file per lifecycle stage. No algorithms here."""
