"""The method, the attacks and their arithmetic: PyTorch and NumPy only, no Ray, no MLflow, no file paths."""
