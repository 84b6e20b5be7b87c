"""One sampling run: where it is, what the next call may reuse, what was measured. Knows nothing about models."""
