"""Data: read into tables, divided into train, holdout and evaluation rows, with labels matched to
classes.
"""
