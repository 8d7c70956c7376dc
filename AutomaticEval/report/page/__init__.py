"""One HTML file of a run: plain data in, a page out."""
