"""How fast a step is, in what memory, and how that compares. See README.md here; nothing in `src/` needs this."""
