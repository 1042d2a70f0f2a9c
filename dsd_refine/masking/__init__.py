"""Masks: which layers, which weights, how they are applied and measured."""
