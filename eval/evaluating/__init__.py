"""Parts of the scripts of this folder; they import the package, never the reverse."""
