"""Resumable state of a run on disk."""
