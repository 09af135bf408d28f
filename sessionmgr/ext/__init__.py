"""Integrations: each module needs the package it is named after, and is imported by name."""
