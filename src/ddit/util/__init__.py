"""Small helpers that know nothing of patches."""
