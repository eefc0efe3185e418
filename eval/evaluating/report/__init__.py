"""report.html: everything a reader needs to believe or doubt a difference, in one page."""
