"""Classifiers, untouched by the defense, and the auto-encoder that shares their encoder."""
