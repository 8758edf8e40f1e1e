"""What has to run on a GPU, run without one: see `run.py`."""
