"""Preparing data sets: photos, words, captions, class images."""
