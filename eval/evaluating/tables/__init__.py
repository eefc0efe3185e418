"""Tables of results: Markdown, LaTeX, CSV, the leaderboard."""
