"""Grids, HTML pages, plots, tables and the model card."""
