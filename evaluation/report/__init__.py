"""One HTML page about one or several training runs: a section is a file in sections/, report.py has their order."""
