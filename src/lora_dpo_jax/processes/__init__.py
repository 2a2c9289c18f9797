"""How the processes of one run find each other, what they say to each other, and how they end together."""
