"""How the processes of one run find each other, exchange texts, and end together."""
