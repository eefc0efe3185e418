"""What is measured of images: scores, distances, features; which weights did it."""
