"""What the lab says about its runs: the index, comparisons and reports. Everything is derived from run directories."""

from calledshot.lab.comparison import Comparison, Difference, compare
from calledshot.lab.index import Entry, cells, entries
from calledshot.lab.report import write_report
from calledshot.lab.view import View, open_view

__all__ = ["Comparison", "Difference", "Entry", "View", "cells", "compare", "entries", "open_view", "write_report"]
