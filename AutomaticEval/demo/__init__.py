"""A tiny trained model and the closed world it was trained on, so that everything runs without a download."""
