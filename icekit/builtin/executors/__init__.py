"""Executors of this machine."""
