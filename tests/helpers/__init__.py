"""What several test files share, and the programs that they start. Fixtures are in `conftest.py`."""
