"""Stage 2: the models of an experiment are trained on Ray Train."""
