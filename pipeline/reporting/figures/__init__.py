"""The paper's figures, drawn from a run's records.

The caption of a figure says what was measured, on what and on how many images, and what the paper
says of its own figure. ``pipeline/evaluation/figure_data.py`` describes the arrays of figures.npz.
"""
