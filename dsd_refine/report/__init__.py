"""What a run leaves for its reader: report.json, the summary, predictions.parquet, the card."""

from dsd_refine.report.data import data_lines
from dsd_refine.report.report import Report, environment, summary

__all__ = ["Report", "data_lines", "environment", "summary"]
