"""Methods that distil a data set into a few images."""
