"""The sections of the page, a file each.

A section is a function `section(inputs) -> str`: its HTML, or "" when the inputs hold nothing for it. What sections share is in parts.py.
"""
