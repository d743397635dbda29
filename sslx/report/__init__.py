"""``report.html``: runs in one page that works offline, on a phone and in print."""
