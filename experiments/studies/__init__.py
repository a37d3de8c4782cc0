"""Questions that need several runs or several methods: comparisons, sweeps, tables."""
