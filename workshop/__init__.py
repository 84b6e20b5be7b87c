"""What no user runs: tools for developers, training of the demo model, quality, benchmarks and their results."""
