"""``diffalign label``: compare pairs of images in a browser; the answers become preference data."""
