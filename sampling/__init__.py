"""One run of a sampler: where it is, what the next call may reuse, what was measured. Knows no model."""
