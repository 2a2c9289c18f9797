"""A run, assembled once for all commands."""
