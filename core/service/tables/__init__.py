"""The tables, a module a resource, and the conditions of their partial indexes."""
