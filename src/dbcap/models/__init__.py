"""Models: what `--model` may say, where the files are, and weights in a form that is safe to read."""
