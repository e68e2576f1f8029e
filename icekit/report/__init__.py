"""``report.html``: a run, explained to people on one page."""
