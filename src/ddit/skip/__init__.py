"""Skipping, a mechanism of its own: in some steps the model is not called, and its answer is forecast.

It knows nothing of patches: it works without them, under them, and beside another library's cache. The core never
imports it; `ddit.apply` does where ``skip=`` asks for it.
"""
