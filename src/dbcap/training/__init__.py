"""Training DreamBooth models, exact to the bit."""
