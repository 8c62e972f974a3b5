"""Runs beside each other: what may be compared, how sure the difference is, and the table that says so."""
