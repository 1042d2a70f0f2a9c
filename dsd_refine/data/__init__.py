"""Data: read into tables, divided into parts, labels matched with classes."""
