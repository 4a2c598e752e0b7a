"""Methods that distil semantic segmentation networks."""
