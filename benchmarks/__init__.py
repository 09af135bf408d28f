"""Compares the speed and memory of sessionmgr with plain SQLAlchemy and with Celery's manager."""
