"""Typed configuration: the schema with every default, its loader, the shipped recipes and the error types."""
