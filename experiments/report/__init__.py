"""The output of a run: records, results with confidence intervals, figures and an HTML page."""
