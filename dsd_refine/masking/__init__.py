"""Masks: which layers have one, which weights it covers, how it is applied and measured."""
