"""The page `docs/quality.md`, section by section; `page.py` puts it together."""
