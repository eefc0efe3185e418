"""Measures of images: scores, distances, features, and the weights that made them."""
