"""The cost of a step: operations, memory, traffic, and the performance of devices."""
