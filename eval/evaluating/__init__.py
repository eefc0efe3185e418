"""What the scripts of this folder are made of; it imports the package, never the reverse."""
