"""Comparisons of arms, and checks of the source on the user's data."""
