"""Reports: run files in, tables, plots, report.md and report.html out. Nothing here trains or re-derives a figure."""
