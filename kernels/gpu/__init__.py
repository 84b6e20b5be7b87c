"""The Triton half of the mathematics: each file matches the plain torch file of the same name one folder up."""
