"""Everything that wants a GPU, as one command for a machine that is lent for minutes; see docs/benchmarks.md."""
