"""What a step costs: operations, memory, traffic, and what devices can do."""
