"""The report: sets of measured videos compared on one page that can be sent on."""
