"""The page about a run, report.html, and the page that compares several: from a run's files to one HTML file."""
