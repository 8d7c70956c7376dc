"""Code that several test files import, and programs that tests start. Fixtures are in `conftest.py`."""
