"""Compare a scheduled pipeline with the plain one: how close its pictures stay, and how sure that is."""
