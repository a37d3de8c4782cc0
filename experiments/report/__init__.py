"""What a run leaves for its reader: records, results with intervals, figures, one HTML page."""
