"""What people see of a run: its progress in a terminal, tables, plots and a page."""
