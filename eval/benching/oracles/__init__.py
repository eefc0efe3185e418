"""Methods compared on known tilts."""
