"""Distil an adapter, or a corrector, from a frozen base: ``ddit train``."""
