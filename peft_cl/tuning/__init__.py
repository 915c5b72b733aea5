"""Searching for settings on held-out training images: the space, the images, the search, and its processes."""
