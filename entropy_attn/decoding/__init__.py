"""Sparse decoding: a few queries choose the blocks of a cache that they attend to."""
