"""Methods that distil image classifiers."""
