"""Tiny models of every family that the installed transformers knows, and the table of what Nightpress can do with them."""
