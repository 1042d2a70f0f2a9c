"""The output of a run for its reader: report.json, report.html, the summary and the model card."""

from dsd_refine.report.data import data_lines
from dsd_refine.report.report import Report, environment, summary

__all__ = ["Report", "data_lines", "environment", "summary"]
