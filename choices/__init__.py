"""What a user may choose: settings, presets, what a choice means before it runs, and the errors for wrong choices."""
