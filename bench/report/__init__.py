"""Results for people: tables in the terminal and in Markdown, figures, and a page that holds them all.

Figures and page are in ``page``, which needs matplotlib.
"""

from .tables import change_table, markdown, profile_tables, remarks, rich_tables, self_test_verdict

__all__ = ["change_table", "markdown", "profile_tables", "remarks", "rich_tables", "self_test_verdict"]
