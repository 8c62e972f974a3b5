"""Compares finished runs: groups over seeds, confidence intervals, tables, figures and a report."""
