"""What processes of one run say to each other, and how they end together."""
