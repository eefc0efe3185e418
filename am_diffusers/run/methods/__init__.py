"""Builders of the methods, until each reads its own settings."""
