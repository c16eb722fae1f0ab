"""Processes: signals, exit codes, several processes."""
