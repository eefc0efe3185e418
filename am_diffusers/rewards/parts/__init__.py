"""Helpers that several rewards share."""
