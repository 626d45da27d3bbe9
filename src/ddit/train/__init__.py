"""Distil an adapter from a frozen base: ``ddit train``."""
