"""Sanity checks for saliency maps: the package under the book."""
