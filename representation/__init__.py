"""Learning representations without labels, and measuring their quality and their collapse."""
