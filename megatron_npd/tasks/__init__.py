"""Tasks of evaluation: each makes problems and grades answers. A new one is a file here and a line of `registry.py`."""
