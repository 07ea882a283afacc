"""Models with a head for each task."""
