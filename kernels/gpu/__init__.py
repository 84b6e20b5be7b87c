"""The Triton half of the mathematics: each file stands beside the plain torch one of the same name above."""
