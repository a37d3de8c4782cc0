"""Learning representations without labels: how they are judged, and whether they have collapsed."""
