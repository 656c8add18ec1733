"""The tables, one module per resource, and the conditions of their partial indexes."""
