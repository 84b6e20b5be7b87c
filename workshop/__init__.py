"""What users never run: developer tools, training of the demo model, quality measurements, benchmarks and results."""
