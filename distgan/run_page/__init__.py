"""One HTML page about runs, which loads nothing: records.py reads run folders, page.py writes, page.js draws."""

from distgan.run_page.page import Page

__all__ = ["Page"]
