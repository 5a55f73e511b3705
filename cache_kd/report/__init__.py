"""Runs become tables, plots and one page; what is compared and what the numbers support is decided here."""
