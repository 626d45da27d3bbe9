"""Pipelines by name, one call of them, and what comes out: what commands, training and evaluation share."""
